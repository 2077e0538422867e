def build_info() -> dict[str, bool | int | str]:
    """How this was built (``cuda``, ``cxx_standard``, ``compiler``) and what it runs on (``cpu_capability``)."""

def advise_huge_pages(address: int, bytes: int) -> None: ...
