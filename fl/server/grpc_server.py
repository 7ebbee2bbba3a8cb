"""The server's calls over gRPC, on a UNIX socket on which it terminates TLS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fl.errors import PeerLost
from fl.server.calls import CallerGone, Refusal, Service, subject_of
from fl.server.certificates import ServerCertificates, TlsCredentials
from fl.transport.frames import METHOD_PREFIX
from fl.transport.grpc_channel import TRANSPORT_OPTIONS

MAX_CALLS: Final = 1024
"""Calls that are served at the same time; more are refused by gRPC."""
_OPTIONS: Final = (
    *TRANSPORT_OPTIONS,
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),
)


class GrpcServer:
    """A running server. `close` ends it."""

    def __init__(self, service: Service, certificates: ServerCertificates, path: str) -> None:
        """Serve on the UNIX socket `path`. Raises PeerLost if it cannot be had."""
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="call"),
            handlers=[_handlers(service)],
            options=_OPTIONS,
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        try:
            self._server.add_secure_port(f"unix:{path}", _credentials(certificates))
        except RuntimeError as error:
            raise PeerLost("gRPC cannot listen on its socket", where="address") from error
        self._server.start()

    def close(self) -> None:
        """End it; calls that are under way have two seconds."""
        self._server.stop(grace=2).wait(10)


class _GrpcCaller:
    """The caller of one call."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context

    @property
    def certificate(self) -> bytes:
        pem = next(iter(self._context.auth_context().get("x509_pem_cert", ())), b"")
        if not isinstance(pem, bytes) or not pem:
            raise PeerLost("the caller has no certificate", where="connection")
        return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)

    @property
    def who(self) -> str:
        return f"{subject_of(self.certificate)} over gRPC"

    def cancel(self) -> None:
        self._context.cancel()

    def active(self) -> bool:
        return bool(self._context.is_active())

    def when_over(self, callback: Callable[[], object]) -> None:
        def call() -> None:
            callback()

        if not self._context.add_callback(call):
            call()


def _handlers(service: Service) -> grpc.GenericRpcHandler:
    def appraise(_request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return service.appraise()
        except Refusal as refusal:
            _abort(context, refusal)
            raise

    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Appraise": grpc.unary_unary_rpc_method_handler(appraise),
        **{name: grpc.stream_stream_rpc_method_handler(_answer(service, name)) for name in service.streamed},
        **{name: grpc.unary_stream_rpc_method_handler(_answer(service, name)) for name in service.asked},
    }
    return grpc.method_handlers_generic_handler(METHOD_PREFIX.strip("/"), handlers)


def _answer(service: Service, name: str) -> Callable[[Any, grpc.ServicerContext], Iterator[bytes]]:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from service.answer(
                name, request if isinstance(request, bytes) else _frames(request), _GrpcCaller(context)
            )
        except Refusal as refusal:
            _abort(context, refusal)

    return answer


def _frames(requests: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from requests
    except grpc.RpcError as error:
        raise CallerGone from error


def _abort(context: grpc.ServicerContext, refusal: Refusal) -> None:
    context.abort(grpc.StatusCode[refusal.status], refusal.details)


def _credentials(certificates: ServerCertificates) -> grpc.ServerCredentials:
    """TLS with the guest's current certificate; clients need one of a broker of the charter, or a user's own."""
    seen = [certificates.current()]

    def configuration(newest: TlsCredentials) -> grpc.ServerCertificateConfiguration:
        pair = newest.key.encode(), newest.chain.encode()
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=newest.trusted.encode())

    def changed() -> grpc.ServerCertificateConfiguration | None:
        newest = certificates.current()
        if newest == seen[0]:
            return None
        seen[0] = newest
        return configuration(newest)

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        configuration(seen[0]),
        changed,  # type: ignore[arg-type]  # None means "unchanged" (grpc's documentation), which its stubs leave out
        require_client_authentication=True,
    )
    return credentials
