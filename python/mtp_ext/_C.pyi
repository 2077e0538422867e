def release_workspace() -> int:
    """Frees the memory that the loss keeps between calls; returns its bytes."""

def chunk_size(
    rows: int, vocab_size: int, item_size: int, gpu_width: int, limit_rows: int, limit_bytes: int, sum_width: int
) -> int: ...
def build_info() -> dict[str, bool | int | str]:
    """How this was built (``cuda``, ``cxx_standard``, ``compiler``) and what it runs on (``cpu_capability``)."""

HUGE_PAGE_BYTES: int  # of the smallest allocation that is worth the advice
KEPT_BYTES: int  # of the largest block of logits that is kept between calls

def advise_huge_pages(address: int, bytes: int) -> None: ...
