def chat() -> None:
    pass
