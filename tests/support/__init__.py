"""What several tests share: tiny models, stand-ins, child processes."""
