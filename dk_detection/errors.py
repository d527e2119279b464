"""What a command line says in one line."""


class UserError(Exception):
    """Something that the user can put right. Command lines print it as one line, without a traceback."""
