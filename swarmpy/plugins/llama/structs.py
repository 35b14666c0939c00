"""llama.cpp's structures as the pinned library lays them out, with the defaults it must show.

The C interface has no version of its own: a field put in the middle of a structure moves all that
follow, and a wrong table corrupts memory. So one build is pinned, and before anything is done with
it the defaults it gives are compared, field by field, with those written here.
Source: include/llama.h of llama.cpp at the pinned version (MIT).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p

PACKAGE = "xllamacpp"
PACKAGE_VERSION = "2026.10.11549"
"""The distribution whose library these tables describe; pyproject.toml pins the same."""

LLAMA_VERSION = "0.6.0-dev"
"""What that library's `llama_version()` says."""

LOAD_MODE_MMAP = 1
"""`llama_load_mode`: weights stay mapped from the file; holes in it cost no memory."""

SEQUENCES_MAX = 256
"""llama.cpp's own bound on sequences of one context (`LLAMA_MAX_SEQ`)."""

Table = tuple[tuple[str, type, object], ...]
"""Fields in order: name, C type, default."""

MODEL_PARAMS: Table = (
    ("devices", c_void_p, None),
    ("tensor_buft_overrides", c_void_p, None),
    ("n_gpu_layers", c_int32, -1),
    ("split_mode", c_int, 1),
    ("load_mode", c_int, -1),
    ("lazy_mode", c_int, 1),
    ("main_gpu", c_int32, 0),
    ("tensor_split", c_void_p, None),
    ("progress_callback", c_void_p, None),
    ("progress_callback_user_data", c_void_p, None),
    ("kv_overrides", c_void_p, None),
    ("vocab_only", c_bool, False),
    ("check_tensors", c_bool, False),
    ("use_extra_bufts", c_bool, True),
    ("no_host", c_bool, False),
    ("no_alloc", c_bool, False),
    ("load_mtp", c_bool, False),
)

CONTEXT_PARAMS: Table = (
    ("n_ctx", c_uint32, 512),
    ("n_batch", c_uint32, 2048),
    ("n_ubatch", c_uint32, 512),
    ("n_seq_max", c_uint32, 1),
    ("n_rs_seq", c_uint32, 0),
    ("n_outputs_max", c_uint32, 0),
    ("n_outputs_max_per_seq", c_uint32, 1),
    ("n_threads", c_int32, 4),
    ("n_threads_batch", c_int32, 4),
    ("ctx_type", c_int, 0),
    ("rope_scaling_type", c_int, -1),
    ("pooling_type", c_int, -1),
    ("attention_type", c_int, -1),
    ("flash_attn_type", c_int, -1),
    ("rope_freq_base", c_float, 0.0),
    ("rope_freq_scale", c_float, 0.0),
    ("yarn_ext_factor", c_float, -1.0),
    ("yarn_attn_factor", c_float, -1.0),
    ("yarn_beta_fast", c_float, -1.0),
    ("yarn_beta_slow", c_float, -1.0),
    ("yarn_orig_ctx", c_uint32, 0),
    ("defrag_thold", c_float, -1.0),
    ("cb_eval", c_void_p, None),
    ("cb_eval_user_data", c_void_p, None),
    ("type_k", c_int, 1),
    ("type_v", c_int, 1),
    ("moe_cache_size", c_size_t, 0),
    ("abort_callback", c_void_p, None),
    ("abort_callback_data", c_void_p, None),
    ("embeddings", c_bool, False),
    ("offload_kqv", c_bool, True),
    ("no_perf", c_bool, True),
    ("op_offload", c_bool, True),
    ("swa_full", c_bool, True),
    ("kv_unified", c_bool, False),
    ("samplers", c_void_p, None),
    ("n_samplers", c_size_t, 0),
    ("ctx_other", c_void_p, None),
)


class ModelParams(ctypes.Structure):
    """`struct llama_model_params`."""

    _fields_ = [(name, kind) for name, kind, _ in MODEL_PARAMS]


class ContextParams(ctypes.Structure):
    """`struct llama_context_params`."""

    _fields_ = [(name, kind) for name, kind, _ in CONTEXT_PARAMS]


class Batch(ctypes.Structure):
    """`struct llama_batch`: token ids or hidden states of `n_tokens` positions of any sequences."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


EvalCallback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
"""Asked of each node of a graph whether it is wanted, then told that it was computed."""

LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

SIGNATURES: Mapping[str, tuple[type | None, tuple[type, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_version": (c_char_p, ()),
    "llama_print_system_info": (c_char_p, ()),
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_n_embd": (c_int32, (c_void_p,)),
    "llama_model_n_layer": (c_int32, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_memory_seq_pos_max": (c_int32, (c_void_p, c_int32)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits_ith": (c_void_p, (c_void_p, c_int32)),
    "llama_state_seq_get_size": (c_size_t, (c_void_p, c_int32)),
    "llama_state_seq_get_data": (c_size_t, (c_void_p, c_void_p, c_size_t, c_int32)),
    "llama_state_seq_set_data": (c_size_t, (c_void_p, c_void_p, c_size_t, c_int32)),
    "ggml_get_name": (c_void_p, (c_void_p,)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}
"""Result and arguments of every function that is called."""

ROOM_BYTES = 256
"""Read behind a structure whose size is not known yet: a longer one must not overwrite ours."""


def read_defaults(function: Callable[[], ctypes.Structure], table: Table) -> dict[str, object]:
    """Call a `..._default_params` and return what its fields hold, as the table lays them out.

    Args:
        function: A C function that returns the structure, its result type not yet set.
    """
    fields = [(name, kind) for name, kind, _ in table]
    roomy = type(
        "Roomy", (ctypes.Structure,), {"_fields_": [*fields, ("room", ctypes.c_ubyte * ROOM_BYTES)]}
    )
    function.restype = roomy  # type: ignore[attr-defined]
    function.argtypes = ()  # type: ignore[attr-defined]
    read = function()
    return {name: getattr(read, name) for name, _, _ in table}


def differing_defaults(values: Mapping[str, object], table: Table) -> list[str]:
    """Return the names of fields that do not hold the default of the table, in its order."""
    return [name for name, _, default in table if values[name] != default]
