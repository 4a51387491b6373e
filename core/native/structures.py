"""What is handed over to C++: the structures of model.h, law.h and decode.cpp, field by field."""

from ctypes import POINTER, Structure, c_double, c_int64, c_void_p


class Matrix(Structure):
    _fields_ = [("panels", c_void_p), ("scales", c_void_p), ("bias", c_void_p), ("rows", c_int64), ("columns", c_int64)]


class Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_double)]


class Half(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("first_head", "num_heads", "first_channel")),
        *((name, Matrix) for name in ("qkv", "out", "ffn_in", "ffn_out")),
    ]


class Block(Structure):
    _fields_ = [("attention_norm", Norm), ("ffn_norm", Norm), ("halves", Half * 2)]


class Level(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("dim", "num_layers", "num_heads", "head_dim", "ffn_dim", "span", "row_length", "memory")),
        ("embedding", c_void_p),
        ("byte_dim", c_int64),
        *((name, c_void_p) for name in ("byte_positions", "pad", "row_positions", "cos", "sin")),
        ("project", Matrix),
        ("blocks", POINTER(Block)),
        ("residual_scalars", c_void_p),
        ("norm", Norm),
    ]


class Model(Structure):
    _fields_ = [
        ("levels", POINTER(Level)),
        *((name, c_int64) for name in ("num_levels", "patch_size", "real_previous", "slices", "relu_squared")),
        *((name, c_double) for name in ("qk_epsilon", "logit_softcap")),
        ("unembedder", Matrix),
        ("head", Matrix),
    ]


class LevelState(Structure):
    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("num_slots", c_int64), ("from_parent", c_void_p)]


class State(Structure):
    _fields_ = [
        ("levels", LevelState * 2),
        ("patch_bytes", c_void_p),
        ("position", c_void_p),
        ("woken", c_void_p),
        ("logits", c_void_p),
    ]


class Law(Structure):
    _fields_ = [("temperature", c_double), ("top_k", c_int64), ("top_p", c_double)]


class Part(Structure):
    _fields_ = [
        ("sequence", c_void_p),
        ("count", c_int64),
        ("num_forced", c_int64),
        ("law", Law),
        *((name, c_void_p) for name in ("uniforms", "bytes", "bits")),
    ]
