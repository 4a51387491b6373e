"""The one exception for input that cannot be used."""


class UserError(ValueError):
    """Its text is one plain sentence for a person: what was given, what is expected, what to do."""
