"""What to do where a model's weights cannot be fetched."""

from collections.abc import Iterator

UNREACHED = {
    "LocalEntryNotFoundError", "OfflineModeIsEnabled", "URLError", "ConnectionError", "NetworkError", "TimeoutError",
    "TimeoutException", "gaierror",
}  # fmt: skip


def download_remedy(error: BaseException) -> str | None:
    """What was expected and what to do; None where an error is not one of fetching.

    Kinds are told by name, because the libraries that raise them need not be installed.
    """
    kinds = {kind.__name__ for each in _causes(error) for kind in type(each).__mro__}
    if "GatedRepoError" in kinds:
        return (
            "expected access to it, which its owner gives; ask for it on the model's page, then log in with `hf auth "
            "login` or set HF_TOKEN"
        )
    if "RepositoryNotFoundError" in kinds:
        return "expected a model that is there and may be read; mend its name, or log in with `hf auth login`"
    if kinds & UNREACHED:
        return (
            "expected a network that reaches the host; fetch it where there is one, and copy it into the cache here, "
            "or name its folder or checkpoint"
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
