"""Download a file from the first mirror that serves it intact."""

from collections.abc import Sequence
from pathlib import Path

import pooch  # type: ignore[import-untyped]


def fetch(name: str, sha256: str, mirrors: Sequence[str], data_dir: Path) -> Path:
    """Download one file, whole and verified or not at all.

    Args:
        name: the file's name, on the mirrors and in `data_dir`.
        sha256: hex digest that the file must have.
        mirrors: addresses of folders, tried in order.
        data_dir: where the file goes; created if needed.

    Returns:
        Path of the file.

    Raises:
        ConnectionError: no mirror served the file with that digest.
    """
    failures = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}"
        try:
            downloader = pooch.HTTPDownloader(progressbar=True)
            pooch.retrieve(url, f"sha256:{sha256}", name, data_dir, downloader=downloader)
        # requests raises OSErrors, for a wrong digest or address pooch raises ValueErrors
        except (OSError, ValueError) as error:
            failures.append(f"\n  {url}: {error}")
        else:
            return data_dir / name
    raise ConnectionError(
        f"Expected `{name}` in `data_dir`, or a mirror that serves it, but `{data_dir}` lacks it "
        f"and every download failed:{''.join(failures) or ' no mirrors were given'}\n"
        f"Put the file into `{data_dir}` by hand, or run once where one of the mirrors is in reach."
    )
