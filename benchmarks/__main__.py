"""`python -m benchmarks`: the quick encode benchmark; its options may follow."""

import sys

from benchmarks.encode import main

if __name__ == "__main__":
    main(["--quick", *sys.argv[1:]])
