"""What the command ``fairseq-skd`` does, a file a subcommand. Training imports nothing of it."""


class CommandError(Exception):
    """The command cannot be carried out; the message says what was wrong and what to do."""
