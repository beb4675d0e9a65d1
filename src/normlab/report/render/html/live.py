"""The mark of a page that is rebuilt while it is open: `live.js` then loads it again, now and then."""


def as_live(page: str, stamp: str) -> str:
    """Return a page with the mark; `stamp` is the time, ISO 8601, that tells its versions apart."""
    return page.replace("<html", f'<html data-live="{stamp}"', 1)


def as_still(page: str, stamp: str) -> str:
    """Return a page without the mark, if it has that of `stamp`; else as it is."""
    return page.replace(f'<html data-live="{stamp}"', "<html", 1)
