def convert() -> None:
    pass
