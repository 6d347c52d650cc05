"""Text of clients, as it is shown to people."""


def on_one_line(text: str) -> str:
    """Escape what isn't printable: it must neither look like another line nor steer a terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
