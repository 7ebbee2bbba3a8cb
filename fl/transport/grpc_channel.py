"""Calls over gRPC."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator
from typing import Any, Final

import grpc

from fl.errors import CallFailed
from fl.transport.frames import MAX_FRAME, METHOD_PREFIX

TRANSPORT_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", MAX_FRAME),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
"""The one liveness rule: a peer that answers no ping for ten seconds is gone."""


class GrpcChannel:
    """A connection to the server with this certificate (DER), at `target` (host:port, or unix:PATH)."""

    def __init__(self, target: str, *, certificate: bytes, host: str, tls_key: str, certificate_pem: str) -> None:
        """`host`: the DNS name in the server's certificate."""
        credentials = grpc.ssl_channel_credentials(
            root_certificates=ssl.DER_cert_to_PEM_cert(certificate).encode(),
            private_key=tls_key.encode(),
            certificate_chain=certificate_pem.encode(),
        )
        options = (*TRANSPORT_OPTIONS, ("grpc.ssl_target_name_override", host), ("grpc.default_authority", host))
        self._channel: Any = grpc.secure_channel(target, credentials, options)  # its stubs want serializers

    def call(self, method: str, frames: Iterable[bytes], *, timeout: float | None) -> GrpcCall:
        """Call a method that takes a stream of frames."""
        return GrpcCall(self._channel.stream_stream(METHOD_PREFIX + method)(iter(frames), timeout=timeout))

    def ask(self, method: str, frame: bytes, *, timeout: float | None) -> GrpcCall:
        """Call a method that takes one frame."""
        return GrpcCall(self._channel.unary_stream(METHOD_PREFIX + method)(frame, timeout=timeout))

    def appraise(self, *, timeout: float) -> bytes:
        """The server's frame about itself. Raises CallFailed."""
        try:
            answer: bytes = self._channel.unary_unary(METHOD_PREFIX + "Appraise")(b"", timeout=timeout)
        except grpc.RpcError as error:
            raise _failed(error) from error
        return answer

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


class GrpcCall:
    """A call under way."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            frame: bytes = next(self._call)
        except grpc.RpcError as error:
            raise _failed(error) from error
        return frame

    def cancel(self) -> None:
        """End the call."""
        self._call.cancel()


def _failed(error: grpc.RpcError) -> CallFailed:
    code = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
    return CallFailed(str(code.name), getattr(error, "details", lambda: "")() or "")
