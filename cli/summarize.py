def summarize() -> None:
    pass
