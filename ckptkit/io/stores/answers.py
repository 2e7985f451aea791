"""What a store's refusal means, in one line. Nothing that a library says is printed: it may hold credentials."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ckptkit.errors import CkptkitError, InputError, StorageError

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_BUSY = {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "429", "503", "ServiceUnavailable"}
_DENIED = {"AccessDenied", "AllAccessDisabled", "Forbidden", "403", "UnauthorizedAccess"}
_WRONG_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "InvalidToken", "401"}
_ELSEWHERE = {"PermanentRedirect", "301", "TemporaryRedirect", "307", "IllegalLocationConstraintException"}
_GONE = {"NoSuchKey", "404", "NotFound"}
_CHANGED = {"PreconditionFailed", "412"}
_HINTS = {
    "NoCredentialsError": ("no credentials", "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "PartialCredentialsError": ("half of the credentials is missing", "set the access key and its secret"),
    "ProfileNotFound": ("AWS_PROFILE names no profile", "choose one of ~/.aws/config"),
    "ConfigParseError": ("the AWS configuration cannot be read", "repair ~/.aws/config"),
    "NoRegionError": ("no region", "set AWS_REGION"),
    "InvalidRegionError": ("the region is no name of one", "set AWS_REGION"),
    "TokenRetrievalError": ("the session of single sign-on is over", "run `aws sso login`"),
    "UnauthorizedSSOTokenError": ("the session of single sign-on is over", "run `aws sso login`"),
    "SSOTokenLoadError": ("there is no session of single sign-on", "run `aws sso login`"),
    "CredentialRetrievalError": ("the credentials cannot be fetched", "run `aws sts get-caller-identity` to see why"),
    "RefreshWithMFAUnsupportedError": ("the credentials are over", "get new ones"),
    "EndpointConnectionError": ("the store cannot be reached", "check AWS_ENDPOINT_URL and the network"),
    "ConnectTimeoutError": ("the store cannot be reached", "check AWS_ENDPOINT_URL and the network"),
    "ReadTimeoutError": ("the store does not answer", "try again"),
    "ProxyConnectionError": ("the proxy cannot be reached", "check HTTPS_PROXY"),
    "SSLError": ("no secure connection can be made", "check the certificate, and AWS_CA_BUNDLE"),
    "ConnectionClosedError": ("the store closes the connection", "try again"),
    "ResponseParserError": ("the answer is none that S3 gives", "check AWS_ENDPOINT_URL"),
}


@contextmanager
def one_line_errors(where: object) -> Iterator[None]:
    """Turns errors of botocore and obstore into one line about a place in a store."""
    try:
        yield
    except CkptkitError:
        raise
    except Exception as error:
        raise meaning(error, where) from None


def code_of(error: Exception) -> str:
    """What S3 calls the error that a library raised, or the status of the answer; empty where there was none."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return str(answer.get("Error", {}).get("Code", ""))
    text = str(error)
    if (found := _CODE.search(text)) is not None:
        return found[1]
    return found[1] if (found := _STATUS.search(text)) is not None else ""


def is_denied(error: Exception) -> bool:
    """Whether what was asked for is forbidden."""
    kinds = ("PermissionError", "PermissionDeniedError", "UnauthenticatedError")
    return code_of(error) in _DENIED or type(error).__name__ in kinds


def meaning(error: Exception, where: object) -> CkptkitError:
    """An error of botocore or obstore as one of ours."""
    code, kind = code_of(error), type(error).__name__
    if code == "NoSuchBucket":
        return InputError("no such bucket", where=where, hint="check the name and AWS_ENDPOINT_URL")
    if code in EXPIRED:
        return StorageError("the credentials have expired", where=where, hint="renew them and run again")
    if code in _WRONG_KEY:
        return StorageError(f"the store refuses the credentials ({code})", where=where, hint="check them")
    if is_denied(error):
        hint = "it takes s3:ListBucket on the bucket and s3:GetObject on its objects"
        return StorageError("the store does not allow it", where=where, hint=hint)
    if code in _ELSEWHERE:
        return StorageError("the bucket is in another region", where=where, hint="set AWS_REGION to it")
    if code in _GONE or isinstance(error, FileNotFoundError):
        return InputError("the source file is gone", where=where, hint="restore it and run again")
    if code in _CHANGED or kind == "PreconditionError":
        return changed(where)
    if code in _BUSY:
        return StorageError(f"the store is too busy ({code})", where=where, hint="run again later")
    if kind in _HINTS:
        what, hint = _HINTS[kind]
        return StorageError(what, where=where, hint=hint)
    if code:
        return StorageError(f"the store answers with an error ({code})", where=where, hint="try again")
    return _without_code(str(error), kind, where)


def changed(where: object) -> InputError:
    """A file is not what it was when it was listed."""
    return InputError("source changed while converting", where=where, hint="run again once it is complete")


def _without_code(text: str, kind: str, where: object) -> CkptkitError:
    """An error that no answer came with."""
    if "inner: BareRedirect" in text:
        return StorageError("the bucket is in another region", where=where, hint="set AWS_REGION to it")
    if "NotPartial" in text or kind == "NotSupportedError":
        hint = "copy the files to a disk first"
        return StorageError("the server does not give ranges of files", where=where, hint=hint)
    if "kind: Body" in text or "kind: Interrupted" in text:
        hint = "try again, or check what is between here and the store"
        return StorageError("the store's answers are cut short", where=where, hint=hint)
    if "kind: Connect" in text:
        hint = "check the address, AWS_ENDPOINT_URL and the network"
        return StorageError("the store cannot be reached", where=where, hint=hint)
    if "kind: Timeout" in text or "timed out" in text:
        return StorageError("the store does not answer in time", where=where, hint="try again")
    return StorageError(f"the store's answer cannot be read ({kind})", where=where, hint="try again")
