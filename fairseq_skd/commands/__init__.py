"""What the command ``fairseq-skd`` does, a file a subcommand. Training imports nothing of it."""
