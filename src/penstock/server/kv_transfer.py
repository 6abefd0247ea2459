"""vLLM's proxy contract for prefill and decode in servers of their own: `kv_transfer_params`, in requests and answers.

A proxy sends a prompt to P with do_remote_decode and hands what P answers to D. Here that only names P: D asks it for
the blocks itself, and P finds them in its prefix cache. P proves that it holds the cluster's secret, so that nobody
else can make D dial an address. Knows JSON and addresses; no wire.

Source: vLLM 0.15, distributed/kv_transfer/kv_connector/v1/nixl.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.engine.client import LiveRequest
from penstock.server.errors import ApiError, bad_request, clipped
from penstock.server.shapes import Json
from penstock.server.state import ServerState

PARAM = "kv_transfer_params"
MISMATCH = "kv_peer_refused"


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one call has to do with other servers: who has its prompt's KV, or what is told of this one."""

    prefill_at: tuple[str, ...] = ()
    offer: Json | None = None

    @staticmethod
    def asked(params: Mapping[str, Any] | None, state: ServerState) -> Transfer:
        """What a request's field asks of this server. Raises ApiError."""
        if not params or not (params.get("do_remote_decode") or params.get("do_remote_prefill")):
            return Transfer()
        options, ready = state.cluster, state.front.ready
        if options.kv_role is None or options.cluster_secret is None or ready is None or ready.peer is None:
            raise bad_request(f"{PARAM}: this server was started without --kv-role", PARAM, "not_supported")
        name = "do_remote_decode" if params.get("do_remote_decode") else "do_remote_prefill"
        if options.kv_role == ("decode" if name == "do_remote_decode" else "prefill"):
            message = f"{PARAM}.{name}: this server has --kv-role {options.kv_role}"
            raise bad_request(message, PARAM, "not_supported")
        here, kind = ready.peer.wire, f"{ready.cache_format} of model {ready.peer.model}"
        if name == "do_remote_decode":
            return Transfer(offer=offered(here, kind, options.cluster_secret))
        return Transfer((accepted(params, here, kind, options.cluster_secret),))

    def told(self, answer: Json, requests: Sequence[LiveRequest]) -> Json:
        """The answer, with what D needs if a proxy asked for it."""
        if self.offer is None:
            return answer
        return {**answer, PARAM: {**self.offer, "remote_request_id": requests[0].sample_id(0)}}


def offered(address: str, kind: str, secret: str) -> Json:
    """What P answers. `address`: of its inbox, "tcp://host:port"; `kind`: of its KV."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": address,
        "remote_block_ids": [],  # P finds blocks by the prompt
        "remote_host": host,
        "remote_port": int(port),
        "tp_size": 1,
        "remote_kv": kind,
        "remote_proof": proof(address, kind, secret),
    }


def accepted(params: Mapping[str, Any], here: str, kind: str, secret: str) -> str:
    """The inbox of the P that a request names. Raises ApiError that names both ends."""
    host, port = params.get("remote_host"), params.get("remote_port")
    theirs, shown = params.get("remote_kv"), params.get("remote_proof")
    if not isinstance(host, str) or type(port) is not int or not 0 < port < 65536:
        raise bad_request(f"{PARAM}: remote_host and remote_port name no engine", PARAM)
    there = f"tcp://{host}:{port}"
    if not isinstance(theirs, str) or not isinstance(shown, str):
        message = f"{clipped(there)} is no penstock engine: its {PARAM} have no proof for {here}"
        raise ApiError(400, message, param=PARAM, code=MISMATCH)
    if not hmac.compare_digest(proof(there, theirs, secret).encode(), shown.encode()):
        message = f"{clipped(there)} and {here} do not share one --cluster-secret"
        raise ApiError(400, message, param=PARAM, code=MISMATCH)
    if theirs != kind:
        message = f"{there} keeps KV as {theirs}, {here} as {kind}"
        raise ApiError(400, message, param=PARAM, code=MISMATCH)
    return there


def proof(address: str, kind: str, secret: str) -> str:
    """That who says this knows the secret."""
    key = hashlib.blake2b(secret.encode(), digest_size=32, person=b"penstock-params").digest()
    return hashlib.blake2b(f"{address} {kind}".encode(), digest_size=16, key=key).hexdigest()
