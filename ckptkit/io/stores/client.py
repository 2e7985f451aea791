"""A bucket of a store that speaks S3, through botocore: few calls, bounded in time, and errors in one line.

Credentials, region, endpoint and addressing are found as botocore finds them for the store's own tools (environment,
shared files, roles of the machine). Nothing of them is ever part of a message.
"""

from __future__ import annotations

import hashlib
import re
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ckptkit.errors import CkptkitError, StorageError, UsageError
from ckptkit.io.stores.address import Address
from ckptkit.io.stores.session import ATTEMPTS, session_and_client
from ckptkit.printable import printable

_PAGE = 1000
"""Keys that one call deletes."""
_LONGEST = 300
_MD5 = re.compile(r"[0-9a-f]{32}")

_ABSENT = {"404", "NoSuchKey", "NotFound"}
_CONFLICT = {"412", "PreconditionFailed", "ConditionalRequestConflict", "409"}
_NO_CONDITIONS = {"NotImplemented", "501"}
_NO_CALL = {"NotImplemented", "501", "MethodNotAllowed", "405"}
_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_DENIED = {"AccessDenied", "AllAccessDisabled", "403", "Forbidden", "UnauthorizedAccess"}
_BUSY = {"SlowDown", "ServiceUnavailable", "503", "InternalError", "500", "RequestTimeout", "Throttling", "502", "504"}
_RENEW = "renew the credentials and run again with --resume"


class StoppedError(CkptkitError):
    """A call that was not made, because the run has ended."""


class UploadGoneError(StorageError):
    """The store does not know a multipart upload: it is complete, or somebody aborted it."""


class BrokenError(StorageError):
    """An answer broke off."""


class TakenError(CkptkitError):
    """A condition of a call does not hold: the object is there, or is another one."""


class NoConditionsError(CkptkitError):
    """The store says that it has no conditional writes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as the store describes it.

    Attributes:
        key: Its key.
        size: Bytes.
        tag: Its ETag, without quotes.
        metadata: What its writer put beside it; empty in lists.
        age: Seconds since it was written, by the store's own clock; 0 where the store does not say.
    """

    key: str
    size: int
    tag: str
    metadata: Mapping[str, str]
    age: float = 0.0


class Part(NamedTuple):
    """A part of an upload as the store describes it: bytes, and ETag without quotes."""

    size: int
    tag: str


class Bucket:
    """A bucket. Any thread may call.

    Attributes:
        name: Of the bucket.
        stopped: Calls end early once this is set; the one that a store keeps waiting ends with its attempt.
    """

    def __init__(self, address: Address) -> None:
        """Finds out where the store is; makes no call.

        Raises:
            UsageError: botocore is not installed, or its configuration names no store.
        """
        self.name = address.place
        self.stopped: Callable[[], bool] = threading.Event().is_set
        with _configured(f"s3://{self.name}"):
            _, self._client = session_and_client()
        self._client.meta.events.register("before-send.s3", self._before_send)

    # objects

    def objects(self, prefix: str, most: int) -> list[Stored]:
        """The objects whose keys begin with `prefix`, in the order of their keys.

        Args:
            prefix: The beginning.
            most: More than so many are an error.

        Raises:
            StorageError: There are more, or the store does not answer.
        """
        found: list[Stored] = []
        with self._said(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
            for page in pages:
                found += [_listed(item) for item in page.get("Contents", ())]
                if len(found) > most:
                    raise StorageError(f"holds more than {most:,} objects", where=self.url(prefix), hint="clear it up")
        return found

    def head(self, key: str) -> Stored | None:
        """An object, or None if there is none.

        Raises:
            StorageError: The store does not answer.
        """
        with self._said(key):
            try:
                found = self._client.head_object(Bucket=self.name, Key=key)
            except self._errors as error:
                if _code(error) in _ABSENT:
                    return None
                raise
        return _headed(key, found)

    def get(self, key: str, largest: int) -> bytes | None:
        """The bytes of a small object, or None if there is none.

        Raises:
            StorageError: It is larger than `largest` bytes, or the store does not answer.
        """
        with self._said(key):
            try:
                found = self._client.get_object(Bucket=self.name, Key=key)
            except self._errors as error:
                if _code(error) in _ABSENT:
                    return None
                raise
            with found["Body"] as body:
                if found["ContentLength"] > largest:
                    raise StorageError(f"has more than {largest:,} bytes", where=self.url(key), hint="what is it?")
                data: bytes = body.read()
        return data

    def piece(self, key: str, start: int, size: int) -> bytes:
        """Bytes of an object.

        Raises:
            StorageError: The store does not give them.
        """
        for attempt in range(ATTEMPTS):
            # botocore tries again what fails before the first byte comes, and not what breaks off after it.
            try:
                with self._said(key):
                    wanted = f"bytes={start}-{start + size - 1}"
                    with self._client.get_object(Bucket=self.name, Key=key, Range=wanted)["Body"] as body:
                        data: bytes = body.read()
                if len(data) == size:
                    return data
            except BrokenError:
                if attempt == ATTEMPTS - 1:
                    raise
        raise StorageError(f"the store gives other bytes than {start}:{start + size}", where=self.url(key))

    def put(
        self,
        key: str,
        data: bytes | bytearray,
        *,
        metadata: Mapping[str, str] | None = None,
        new: bool = False,
        instead_of: str | None = None,
    ) -> str:
        """Puts an object and gives its ETag.

        Args:
            key: Its key.
            data: Its bytes.
            metadata: What goes beside it.
            new: Only if there is none under this key.
            instead_of: Only if the object that is there has this ETag.

        Raises:
            TakenError: The condition does not hold.
            NoConditionsError: The store says that it has no conditions.
            StorageError: The store does not take it.
        """
        condition: dict[str, str] = {}
        if new:
            condition["IfNoneMatch"] = "*"
        elif instead_of is not None:
            condition["IfMatch"] = f'"{instead_of}"'
        with self._said(key, conditional=bool(condition)):
            answer = self._client.put_object(
                Bucket=self.name,
                Key=key,
                Body=data,
                ContentMD5=_md5(data)[1],
                Metadata=dict(metadata or {}),
                **condition,
            )
        return _tag(answer)

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that are gone do not matter.

        Raises:
            StorageError: The store keeps one.
        """
        for start in range(0, len(keys), _PAGE):
            # One by one where there is one: not every store knows the call for many.
            page = keys[start : start + _PAGE]
            with self._said(page[0]):
                if len(page) == 1:
                    self._client.delete_object(Bucket=self.name, Key=page[0])
                    continue
                wanted = {"Objects": [{"Key": key} for key in page], "Quiet": True}
                answer = self._client.delete_objects(Bucket=self.name, Delete=wanted)
            for error in answer.get("Errors", ())[:1]:
                raise self._error(str(error.get("Code")), str(error.get("Message")), str(error.get("Key")))

    # multipart uploads

    def create(self, key: str, metadata: Mapping[str, str]) -> str:
        """Begins an upload and gives its id. Nobody sees the object before `complete`.

        Raises:
            StorageError: The store does not allow it.
        """
        with self._said(key):
            answer = self._client.create_multipart_upload(Bucket=self.name, Key=key, Metadata=dict(metadata))
        return str(answer["UploadId"])

    def part(self, key: str, upload: str, number: int, data: bytes | bytearray) -> str:
        """Uploads a part and gives its ETag. The store checks the bytes by their MD5, and so do we.

        Raises:
            UploadGoneError: There is no such upload (any more).
            StorageError: The store does not take it, or says that it got other bytes.
        """
        hexadecimal, encoded = _md5(data)
        with self._said(key):
            answer = self._client.upload_part(
                Bucket=self.name, Key=key, UploadId=upload, PartNumber=number, Body=data, ContentMD5=encoded
            )
        tag = _tag(answer)
        # Under a key of the customer, or of the store's key service, an ETag is no MD5.
        plain = answer.get("ServerSideEncryption") in (None, "AES256") and not answer.get("SSECustomerAlgorithm")
        if plain and _MD5.fullmatch(tag) and tag != hexadecimal:
            what = f"the store holds other bytes in part {number} than were sent"
            raise StorageError(what, where=self.url(key), hint="run again with --resume")
        return tag

    def parts(self, key: str, upload: str) -> dict[int, Part] | None:
        """The parts that the store has of an upload, by number; None if there is no such upload, or no such list.

        Raises:
            StorageError: The store does not answer.
        """
        found: dict[int, Part] = {}
        with self._said(key):
            try:
                pages = self._client.get_paginator("list_parts").paginate(Bucket=self.name, Key=key, UploadId=upload)
                for page in pages:
                    for item in page.get("Parts", ()):
                        found[int(item["PartNumber"])] = Part(int(item["Size"]), str(item["ETag"]).strip('"'))
            except self._errors as error:
                if _code(error) in {"NoSuchUpload", *_ABSENT, *_NO_CALL}:
                    return None
                raise
        return found

    def uploads(self, prefix: str) -> list[tuple[str, str]]:
        """(key, id) of the uploads below a prefix that are neither complete nor aborted; none if the store has no list.

        Raises:
            StorageError: The store does not answer.
        """
        found: list[tuple[str, str]] = []
        with self._said(prefix):
            try:
                pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=prefix)
                for page in pages:
                    found += [(str(item["Key"]), str(item["UploadId"])) for item in page.get("Uploads", ())]
            except self._errors as error:
                if _code(error) not in _NO_CALL:
                    raise
        return [item for item in found if item[0].startswith(prefix)]

    def complete(self, key: str, upload: str, tags: Sequence[str]) -> None:
        """Makes an object of an upload.

        Args:
            key: Its key.
            upload: Its id.
            tags: The ETags of all of its parts.

        Raises:
            UploadGoneError: There is no such upload (any more).
            StorageError: The store does not do it.
        """
        parts = [{"PartNumber": number, "ETag": f'"{tag}"'} for number, tag in enumerate(tags, 1)]
        with self._said(key):
            self._client.complete_multipart_upload(
                Bucket=self.name, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            )

    def abort(self, uploads: Iterable[tuple[str, str]]) -> None:
        """Has the store forget uploads (key, id), if it can; those that are gone do not matter.

        Raises:
            StorageError: The store keeps one.
        """
        for key, upload in uploads:
            with self._said(key):
                try:
                    self._client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload)
                except self._errors as error:
                    if _code(error) not in {"NoSuchUpload", *_ABSENT, *_NO_CALL}:
                        raise

    def url(self, key: str) -> str:
        """A key for messages."""
        return f"s3://{self.name}/{printable(key)}"

    # errors

    @cached_property
    def _errors(self) -> type[Exception]:
        from botocore.exceptions import ClientError

        return ClientError  # type: ignore[no-any-return]  # botocore has no types

    def _before_send(self, **_: object) -> None:
        if self.stopped():
            raise StoppedError("the run has ended")

    @contextmanager
    def _said(self, key: str, *, conditional: bool = False) -> Iterator[None]:
        """Turns an error of botocore into one line."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = _code(error)
            if conditional and code in _CONFLICT:
                raise TakenError("taken", where=self.url(key)) from error
            if conditional and code in _NO_CONDITIONS:
                raise NoConditionsError("no conditional writes", where=self.url(key)) from error
            raise self._error(code, str(error.response.get("Error", {}).get("Message", "")), key) from error
        except BotoCoreError as error:
            raise _of_botocore(error, self.url(key)) from error
        except (OSError, ValueError) as error:
            # The answer broke off, or holds what no answer may hold.
            what = f"the store's answer cannot be read ({type(error).__name__})"
            raise BrokenError(what, where=self.url(key), hint="run again with --resume") from error

    def _error(self, code: str, message: str, key: str) -> StorageError | UsageError:
        where = self.url(key)
        if code == "NoSuchBucket":
            return StorageError("the bucket does not exist", where=f"s3://{self.name}", hint="create it first")
        if code in ("NoSuchUpload",):
            hint = "somebody aborted it (a rule of the bucket?): run again with --resume"
            return UploadGoneError("the store does not know the upload", where=where, hint=hint)
        if code in _CREDENTIALS:
            return StorageError(f"the store does not accept the credentials ({code})", where=where, hint=_RENEW)
        if code in _DENIED:
            hint = "writing needs s3:PutObject, GetObject, DeleteObject, ListBucket, AbortMultipartUpload and the lists"
            return StorageError("the store denies access", where=where, hint=f"{hint} of uploads and parts")
        if code in _BUSY:
            what = f"the store is busy or broken, and stays so ({code})"
            return StorageError(what, where=where, hint="run again later with --resume")
        if code in ("EntityTooSmall", "EntityTooLarge"):
            return StorageError(f"the store does not take parts of this size ({code})", where=where)
        if code in ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"):
            what = f"the bytes did not reach the store whole ({code})"
            return StorageError(what, where=where, hint="run again with --resume")
        words = " ".join(printable(message).split())[:_LONGEST]
        return StorageError(f"the store answers {printable(code)[:60]}{f': {words}' if words else ''}", where=where)


@contextmanager
def _configured(where: str) -> Iterator[None]:
    """Turns what botocore says about its configuration into one line."""
    try:
        from botocore.exceptions import BotoCoreError
    except ImportError:
        hint = "pip install 'ckptkit-megatron[stores]'"
        raise UsageError("writing to a store needs botocore", where=where, hint=hint) from None
    try:
        yield
    except BotoCoreError as error:
        raise _of_botocore(error, where) from error
    except ValueError as error:
        what = "the configuration of botocore names no store"
        hint = "check AWS_ENDPOINT_URL and the shared configuration file"
        raise UsageError(f"{what} ({type(error).__name__})", where=where, hint=hint) from None


def _of_botocore(error: Exception, where: str) -> StorageError | UsageError:
    """An error that botocore raises by itself. Its text may hold what the configuration holds, so its kind must do."""
    from botocore import exceptions as kinds

    kind = type(error).__name__
    if isinstance(error, kinds.NoRegionError):
        return UsageError("no region is set", where=where, hint="set AWS_DEFAULT_REGION")
    if isinstance(error, (kinds.NoCredentialsError, kinds.PartialCredentialsError)):
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return StorageError("no credentials were found", where=where, hint=hint)
    if isinstance(error, (kinds.CredentialRetrievalError, kinds.TokenRetrievalError, kinds.SSOError)):
        return StorageError(f"the credentials could not be renewed ({kind})", where=where, hint=_RENEW)
    if isinstance(
        error, (kinds.HTTPClientError, kinds.ConnectionError, kinds.IncompleteReadError, kinds.ResponseStreamingError)
    ):
        hint = "check AWS_ENDPOINT_URL and the network; --resume goes on"
        return BrokenError(f"the store does not answer ({kind})", where=where, hint=hint)
    return StorageError(f"the call could not be made ({kind})", where=where, hint="check the configuration of botocore")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _tag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _md5(data: bytes | bytearray) -> tuple[str, str]:
    """The MD5 of bytes in hexadecimal and in Base64: the checksum that every store knows. No secret rests on it."""
    digest = hashlib.md5(data, usedforsecurity=False)
    return digest.hexdigest(), b64encode(digest.digest()).decode()


def _listed(item: Mapping[str, Any]) -> Stored:
    return Stored(str(item["Key"]), int(item["Size"]), str(item.get("ETag", "")).strip('"'), {})


def _headed(key: str, found: Mapping[str, Any]) -> Stored:
    from email.utils import parsedate_to_datetime

    age = 0.0
    said = found.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if said and found.get("LastModified") is not None:
        try:
            age = max(0.0, (parsedate_to_datetime(said) - found["LastModified"]).total_seconds())
        except (TypeError, ValueError):
            age = 0.0
    return Stored(key, int(found["ContentLength"]), _tag(found), dict(found.get("Metadata", {})), age)
