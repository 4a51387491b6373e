"""Models whose weights lie in memory as steps of few rows read them, and products of many rows by weights laid out once.

From plain bfloat16 weights torch's product on a CPU reads, and lays out anew, all of them each time. Where our kernel can be
had a byte of all rows is one call of it; elsewhere oneDNN multiplies by weights that are laid out once.
"""

import copy
import importlib
from ctypes import Array, Structure, byref, c_void_p, pointer
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.arena import Arena
from core.cache import Cache, LevelCache
from core.errors import UserError
from core.kernels import RELU_SLOPE, has_onednn
from core.kernels import step as kernel
from core.kernels.gpu import can_fuse
from core.models.layers import QK_EPSILON, Block, Slots, Transformer, linear_relu
from core.models.megabyte import Level, MegaByte
from core.models.patches import Unembedder

# That oneDNN's layout is chosen for; products of any other number are right as well.
_FEW_ROWS = 16
_MANY_ROWS = 1024  # from which on a layout is worth making

_products: WeakKeyDictionary[nn.Module, tuple[tuple, "PackedProducts"]] = WeakKeyDictionary()


class FusedTransformer(Transformer):
    """Steps on a GPU in few kernels. It shares the parts of a plain one, and is to be used but not trained.

    Its steps take slots of each row's own, with a mask only where a row must not see all slots before its own.
    """

    def __init__(self, plain: Transformer) -> None:
        nn.Module.__init__(self)
        self.memory, self.row_length = plain.memory, plain.row_length
        self.rotary, self.blocks, self.norm = plain.rotary, plain.blocks, plain.norm
        self.residual_scalars = plain.residual_scalars
        self.training = plain.training
        self.kernels = importlib.import_module("core.kernels.fused")
        self.byte_kernels = importlib.import_module("core.kernels.fused_bytes")

    def step(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        if len(x_BD) <= self.kernels.FEW_ROWS:
            return self.kernels.normalized(self._few_rows(x_BD, cache, slots), self.norm)
        return self._many_rows(x_BD, cache, slots)

    def logits(self, x_BD: Tensor, cache: LevelCache, slots: Slots, embedding: nn.Embedding) -> Tensor:
        """A step of the last level: summands of its logits before the cap, float32 `(parts, B, V)`."""
        if len(x_BD) <= self.kernels.FEW_ROWS:
            x_BD = self._few_rows(x_BD, cache, slots)
            return self.kernels.linear(x_BD, embedding, norm=self.norm, dtype=torch.float32)[None]
        return self.kernels.product(self._many_rows(x_BD, cache, slots), embedding, in_parts=True)

    def _few_rows(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        """The layers without the norm after them."""
        kernels, input_BD = self.kernels, x_BD
        for layer, block in enumerate(self.blocks):
            x_BD = self._mixed(x_BD, input_BD, layer)
            qkv = kernels.linear(x_BD, block.attention.qkv, norm=block.attention_norm)
            x_BD = kernels.linear(self._attend(qkv, layer, cache, slots), block.attention.out, residual=x_BD)
            hidden = kernels.linear(x_BD, block.ffn_in, norm=block.ffn_norm, power=2 if block.squares else 1)
            x_BD = kernels.linear(hidden, block.ffn_out, residual=x_BD)
        return x_BD

    def _many_rows(self, x_BD: Tensor, cache: LevelCache, slots: Slots) -> Tensor:
        kernels, input_BD = self.kernels, x_BD
        norms = [*(block.attention_norm for block in self.blocks), self.norm]
        x_BD = self._mixed(x_BD, input_BD, 0) if self.blocks else x_BD
        h_BD = kernels.normalized(x_BD, norms[0])
        for layer, block in enumerate(self.blocks):
            if layer and self.residual_scalars is not None:
                x_BD = self._mixed(x_BD, input_BD, layer)
                h_BD = kernels.normalized(x_BD, norms[layer])
            qkv = kernels.product(h_BD, block.attention.qkv)
            parts = kernels.product(self._attend(qkv, layer, cache, slots), block.attention.out, in_parts=True)
            x_BD, h_BD = kernels.added(x_BD, parts, block.attention.out.bias, block.ffn_norm)
            hidden = kernels.product(h_BD, block.ffn_in, power=2 if block.squares else 1)
            parts = kernels.product(hidden, block.ffn_out, in_parts=True)
            x_BD, h_BD = kernels.added(x_BD, parts, block.ffn_out.bias, norms[layer + 1])
        return h_BD

    def _attend(self, qkv: Tensor, layer: int, cache: LevelCache, slots: Slots) -> Tensor:
        return self.kernels.attend(
            qkv,
            cache.keys[layer],
            cache.values[layer],
            self.rotary and self.rotary.tables(),
            QK_EPSILON if self.blocks[layer].attention.has_qk_norm else None,
            slots.positions.flatten(),
            slots.mask_BS,
            self.memory + self.row_length,
        )


class PackedMegaByte(MegaByte):
    """A bfloat16 MegaByte whose rows step on a CPU by our kernel. It shares the parts of a plain one, and is not trained.

    It holds the matrices twice: as they were for whole prefixes, and packed.
    """

    def __init__(self, plain: MegaByte) -> None:
        vars(self).update(vars(plain))
        self._kept: list = []  # what the structures point into
        head, config = plain.levels[-1].embedder.embedding, plain.config
        matrices = [_matrix(module) for module in plain.modules() if isinstance(module, nn.Linear | nn.Conv1d) or module is head]
        self._arena = Arena(sum(2 * torch.Size(kernel.blocks_shape(matrix)).numel() for matrix in matrices))
        self.weights = kernel.Model(
            levels=self._array(kernel.Level, [self._level(level) for level in plain.levels]),
            num_levels=len(plain.levels),
            patch_size=config.patch_size,
            real_previous=config.real_previous,
            relu_squared=config.activation == "relu2",
            qk_epsilon=QK_EPSILON if config.qk_norm else 0.0,
            logit_softcap=config.logit_softcap,
            head=self._linear(head),
        )

    def _level(self, level: Level) -> kernel.Level:
        own, embedder, transformer, unembedder = level.config, level.embedder, level.transformer, level.unembedder
        cos, sin = transformer.rotary.tables() if transformer.rotary else (None, None)
        scalars = [(1.0, 0.0)] * own.num_layers if transformer.residual_scalars is None else transformer.residual_scalars.tolist()
        has_children = isinstance(unembedder, Unembedder)
        return kernel.Level(
            layers=self._array(kernel.Layer, [self._layer(*each) for each in zip(transformer.blocks, scalars, strict=True)]),
            norm=self._norm(transformer.norm),
            num_layers=own.num_layers,
            dim=own.dim,
            ffn_dim=own.ffn_dim,
            num_heads=own.num_heads,
            span=level.span,
            row_length=level.row_length,
            memory=own.cross_patch,
            cos=self._floats(cos),
            sin=self._floats(sin),
            embedding=self._pointer(embedder.embedding.weight),
            byte_dim=embedder.embedding.embedding_dim,
            byte_positions=self._pointer(embedder.positions and embedder.positions.weight),
            pad=self._pointer(level.pad),
            positions=self._pointer(level.positions),
            convs=self._array(kernel.Conv, [kernel.Conv(self._linear(c.conv), c.tail_length + 1) for c in embedder.convs]),
            num_convs=len(embedder.convs),
            project=self._linear(embedder.project if isinstance(embedder.project, nn.Linear) else None),
            unembedder=self._linear(unembedder.project if has_children else None),
            num_slices=unembedder.num_children if has_children and unembedder.slices else 1,
        )

    def _layer(self, block: Block, scalars: list[float]) -> kernel.Layer:
        of_before, of_input = scalars
        return kernel.Layer(
            attention_norm=self._norm(block.attention_norm),
            qkv=self._linear(block.attention.qkv),
            out=self._linear(block.attention.out),
            ffn_norm=self._norm(block.ffn_norm),
            ffn_in=self._linear(block.ffn_in),
            ffn_out=self._linear(block.ffn_out),
            of_before=of_before,
            of_input=of_input,
        )

    def _norm(self, norm: nn.LayerNorm) -> kernel.Norm:
        return kernel.Norm(self._floats(norm.weight), self._floats(norm.bias), norm.eps)

    def _linear(self, layer: nn.Module | None) -> kernel.Linear:
        if layer is None:
            return kernel.Linear()
        matrix = _matrix(layer)
        blocks = self._arena.take(kernel.blocks_shape(matrix), torch.bfloat16)
        kernel.pack(matrix, blocks)
        num_outputs, num_inputs = (kernel.BLOCK * size for size in blocks.shape[:2])
        bias = getattr(layer, "bias", None)
        bias = F.pad(bias.float(), (0, num_outputs - len(bias))) if bias is not None else torch.zeros(num_outputs)
        return kernel.Linear(blocks.data_ptr(), self._pointer(bias), num_inputs, num_outputs)

    def _floats(self, values: Tensor | None) -> int | None:
        return self._pointer(None if values is None else values.float())

    def _pointer(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        values = values.detach().contiguous()
        self._kept.append(values)
        return values.data_ptr()

    def _array(self, kind: type[Structure], items: list[Structure]) -> Array:
        array = (kind * len(items))(*items)
        self._kept.append(array)
        return array


def _matrix(module: nn.Module) -> Tensor:
    """A layer's weights by output and input; inputs of a convolution are its window's bytes one after another."""
    weight = module.weight.detach()
    return weight.transpose(1, 2).flatten(1) if weight.ndim == 3 else weight


class PackedRows:
    """The rows of a cache; the next byte of them all is one call.

    Args:
        buffers: what rounds are made from and what comes out of them, by the names of `kernel.Rows`.
    """

    def __init__(self, model: PackedMegaByte, cache: Cache, buffers: dict[str, Tensor]) -> None:
        levels = model.weights.levels[: model.weights.num_levels]
        dim = max(level.dim for level in levels)
        convs = [(level.span, conv.windows) for level in levels for conv in level.convs[: level.num_convs]]
        widths = {
            "words": max(max(dim, level.project.num_inputs, level.num_slices * level.unembedder.num_inputs) for level in levels),
            "windows": max((span * windows.num_inputs for span, windows in convs), default=0),
            "normalized": dim,
            "qkv": 3 * dim,
            "attended": dim,
            "hidden": max(level.ffn_dim for level in levels),
        }
        between = {name: torch.zeros(cache.batch_size, width, dtype=torch.bfloat16) for name, width in widths.items()}
        widths = {"x": dim, "input": dim, "convolved": max((span * windows.num_outputs for span, windows in convs), default=0)}
        between |= {name: torch.zeros(cache.batch_size, width) for name, width in widths.items()}
        num_weights = max(level.keys.shape[3] for level in cache.levels)
        self._weights = torch.zeros(torch.get_num_threads(), num_weights)
        buffers = {"patch_bytes": cache.patch_bytes_BP, **buffers, **between, "weights": self._weights}
        self._kept = model, cache, buffers
        self._rows = kernel.Rows(
            model=pointer(model.weights),
            levels=(kernel.LevelState * len(levels))(*map(self._state, cache.levels)),
            num_rows=cache.batch_size,
            round_size=buffers["bytes"].shape[1],
            num_weights=num_weights,
            **{name: self._pointer(tensor) for name, tensor in buffers.items()},
        )

    def make_byte(self, first: int) -> None:
        """Draws and appends a byte of every row, at a place where the levels from `first` on wake."""
        kernel.library().step_rows(byref(self._rows), first, min(torch.get_num_threads(), len(self._weights)))

    def _state(self, level: LevelCache) -> kernel.LevelState:
        assert level.keys.dtype == level.values.dtype == torch.bfloat16
        parent = None if level.from_parent_BLD is None else self._pointer(level.from_parent_BLD)
        tails = (c_void_p * len(level.conv_tails))(*map(self._pointer, level.conv_tails))
        return kernel.LevelState(self._pointer(level.keys), self._pointer(level.values), level.keys.shape[3], parent, tails)

    @staticmethod
    def _pointer(tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        return tensor.data_ptr()


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 by oneDNN, to be used but not trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        weight = linear.weight.detach()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, _FEW_ROWS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedProducts(TorchFunctionMode):
    """Inside, linear layers on a CPU multiply many rows by weights that oneDNN has laid out once, without gradients.

    Otherwise it lays them out for each product anew, torch writes the bias as the sums that the product is added to, and a ReLU
    is a pass of its own. What is laid out takes as much memory again as the weights, or half as much in bf16.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packed: dict[tuple[Tensor, torch.dtype], Tensor] = {}  # by the parameter and what it is rounded to

    def __torch_function__(self, function, types, args=(), kwargs=None):
        has_relu = function is linear_relu and isinstance(args[1], nn.Linear)
        operands = (args[0], args[1].weight, args[1].bias) if has_relu else args
        is_large = (has_relu or function is F.linear) and args[0].numel() >= _MANY_ROWS * args[0].shape[-1]
        if is_large and len(operands) > 1 and isinstance(operands[1], nn.Parameter):
            dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else args[0].dtype
            if dtype in (torch.bfloat16, torch.float32) and has_onednn(dtype):
                return self._linear(dtype, has_relu, *operands, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _linear(self, dtype: torch.dtype, has_relu: bool, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        packed = self._packed.get((weight, dtype))  # two threads may find the same
        if packed is None:
            packed = self._packed[weight, dtype] = weight.detach().to(dtype)  # a layout is worth making for what comes again
        elif not packed.is_mkldnn:
            packed = self._packed[weight, dtype] = torch.ops.mkldnn._reorder_linear_weight(packed, _MANY_ROWS)
        bias = None if bias is None else bias.to(dtype)
        activation = ("leaky_relu", [RELU_SLOPE]) if has_relu else ("none", [])
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype).contiguous(), packed, bias, *activation, "")


def products_of(model: nn.Module, is_bf16: bool) -> PackedProducts:
    """Products by the model's present weights. Those in bf16 are kept as long as the model, for its further scores.

    Others would take twice the memory, and spare no rounding.
    """
    if not is_bf16 or any(parameter.is_inference() for parameter in model.parameters()):
        return PackedProducts()
    now = fingerprint(model)
    known, products = _products.get(model, (None, None))
    if known != now:
        products = PackedProducts()
        _products[model] = now, products
    return products


def fingerprint(model: nn.Module) -> tuple:
    """Changes when a weight is replaced or written to, unless by its `data` or in inference mode."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())


def fused(model: MegaByte) -> MegaByte:
    """A model that shares the parameters of this one and steps on its GPU in few kernels.

    Raises:
        UserError: if this machine cannot build the kernels.
    """
    if not can_fuse(next(model.parameters()).device):
        raise UserError("fused steps need Triton, a C compiler and Python's headers; install them, or choose another engine")
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for level in twin.levels:
        level.transformer = FusedTransformer(level.transformer)
    return twin


def packed(model: MegaByte) -> MegaByte:
    """A MegaByte in bfloat16 that steps as fast as this machine can; the same one where it has no such products."""
    if _can_step(model):
        return PackedMegaByte(model)
    if has_onednn() and model.levels[0].pad.device.type == "cpu":
        for module in [module for level in model.levels for module in level.transformer.modules()]:
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, PackedLinear(child))
    return model


def _can_step(model: MegaByte) -> bool:
    """Whether the kernel takes a model, and this machine has it."""
    if any(parameter.device.type != "cpu" or parameter.dtype != torch.bfloat16 for parameter in model.parameters()):
        return False
    has_form = all(
        own.num_layers > 0 and own.head_dim == kernel.CHANNELS and own.ffn_dim % kernel.BLOCK == 0 for own in model.config.levels
    )
    return has_form and kernel.library() is not None
