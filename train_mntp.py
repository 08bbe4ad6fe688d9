"""`python train_mntp.py --model_name ID`: the seed system's command; see docs/migrating.md."""

from unmasked.cli.seed_scripts import main

if __name__ == "__main__":
    main("mntp")
