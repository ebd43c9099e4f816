"""Students: the teacher's own weights without what matters least, and a teacher that never notices."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    XGLMConfig,
)

from whisper_hf import WhisperLMConfig, from_dense
from whisper_hf.calibration import IMPORTANCES, layer_importance
from whisper_hf.distillation.student import student_from
from whisper_hf.model.configuration_whisper_lm import FULL_ATTENTION, MASKED_SPARSE_ATTENTION

from ..conftest import SIZES, SPARSE, VOCABULARY, tokens

DEPTH = 4
DEEP = {**SIZES, "num_hidden_layers": DEPTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXED = [FULL_ATTENTION, MASKED_SPARSE_ATTENTION, FULL_ATTENTION, MASKED_SPARSE_ATTENTION]
TEACHERS = {
    "whisper_lm": WhisperLMConfig(**DEEP, sparse_attention=SPARSE, layer_types=MIXED, use_qk_norm=True),
    "llama with biases": LlamaConfig(**DEEP, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**DEEP, sliding_window=None, head_dim=16),
    "qwen2": Qwen2Config(**DEEP, use_sliding_window=True, sliding_window=32, max_window_layers=1),
    "qwen3": Qwen3Config(**DEEP, head_dim=16, tie_word_embeddings=True),
}
NO_OP = 2  # the layer that `with_no_op` makes one

every_teacher = pytest.mark.parametrize("name", TEACHERS)


def teacher_of(config: object, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model with random weights, biases and norms included."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.generation_config = GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True, eos_token_id=[2, 3])
    return model


def with_no_op(model: PreTrainedModel) -> PreTrainedModel:
    """Make one layer write nothing into the residual stream."""
    layer = model.base_model.layers[NO_OP]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        for parameter in projection.parameters():
            parameter.data.zero_()
    return model


def calibration() -> list[torch.Tensor]:
    """Return a sequence and a batch, longer than the sparse budget."""
    return [tokens(1, 70)[0], tokens(2, 80)]


def own_words(model: PreTrainedModel) -> torch.Tensor:
    """Let the model continue random tokens, so that all of its layers help to predict them: `[4, 64]` int64."""
    ids = tokens(4, 4)
    while ids.shape[1] < 64:
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def nats(model: PreTrainedModel, batches: list[torch.Tensor]) -> float:
    """Return the mean next-token cross-entropy, computed without the module under test."""
    total, count = 0.0, 0
    for ids in batches:
        logits = model(torch.atleast_2d(ids)).logits[:, :-1].flatten(0, 1)
        targets = torch.atleast_2d(ids)[:, 1:].flatten()
        total, count = total + cross_entropy(logits, targets, reduction="sum").item(), count + len(targets)
    return total / count


def assert_same_weights(student: nn.Module, teacher: nn.Module) -> None:
    expected = teacher.state_dict()
    assert list(student.state_dict()) == list(expected)
    for key, tensor in student.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@every_teacher
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_with_everything_is_the_teacher_in_other_memory(name: str, dtype: torch.dtype) -> None:
    teacher = teacher_of(TEACHERS[name], dtype).train()
    student = student_from(teacher)
    assert type(student) is type(teacher)
    assert not student.training
    assert_same_weights(student, teacher)
    assert torch.equal(student(tokens()).logits, teacher.eval()(tokens()).logits)
    assert student.dtype == dtype
    assert student.config.to_dict() == teacher.config.to_dict()
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    is_tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert is_tied == teacher.config.tie_word_embeddings


@every_teacher
def test_listed_layers_are_kept_with_their_weights(name: str) -> None:
    teacher = teacher_of(TEACHERS[name])
    student = student_from(teacher, layers=[0, 3])
    assert student.config.num_hidden_layers == len(student.base_model.layers) == 2
    for index, layer in enumerate(student.base_model.layers):
        assert layer.self_attn.layer_idx == index
        assert_same_weights(layer, teacher.base_model.layers[[0, 3][index]])
    for part in ("embed_tokens", "norm"):
        assert_same_weights(getattr(student.base_model, part), getattr(teacher.base_model, part))
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)


@every_teacher
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_layer_that_does_nothing_is_found_and_not_missed(name: str, importance: str) -> None:
    teacher = with_no_op(teacher_of(TEACHERS[name]))
    words = [own_words(teacher)]
    measured = layer_importance(teacher, words, importance)
    assert measured[NO_OP] == min(measured) == pytest.approx(0.0, abs=1e-6)
    student = student_from(teacher, DEPTH - 1, calibration=words, importance=importance)
    assert_same_weights(student, student_from(teacher, layers=[i for i in range(DEPTH) if i != NO_OP]))
    assert torch.equal(student(tokens()).logits, teacher(tokens()).logits)


@every_teacher
def test_importance_is_what_a_student_without_the_layer_loses(name: str) -> None:
    teacher = teacher_of(TEACHERS[name])
    losses = [nats(student_from(teacher, layers=kept), calibration()) for kept in all_but_one(range(DEPTH))]
    expected = [loss - nats(teacher, calibration()) for loss in losses]
    assert layer_importance(teacher, calibration()) == pytest.approx(expected, abs=1e-5)


@every_teacher
def test_block_influence_is_how_far_a_layer_turns_the_hidden_states(name: str) -> None:
    teacher = teacher_of(TEACHERS[name])
    teacher.base_model.norm = nn.Identity()  # the last of the model's hidden states is normalised
    states = teacher(calibration()[1], output_hidden_states=True).hidden_states
    expected = [1 - cosine_similarity(before, after, dim=-1).mean().item() for before, after in pairwise(states)]
    assert layer_importance(teacher, calibration()[1:], "block_influence") == pytest.approx(expected, abs=1e-5)


def all_but_one(layers: list[int] | range) -> list[list[int]]:
    return [[other for other in layers if other != layer] for layer in layers]


def test_removal_is_greedy() -> None:
    teacher = teacher_of(LlamaConfig(**{**DEEP, "num_hidden_layers": 6}))
    kept: list[int] = list(range(6))
    while len(kept) > 2:
        kept = min(all_but_one(kept), key=lambda layers: nats(student_from(teacher, layers=layers), calibration()))
    measured = layer_importance(teacher, calibration())
    assert kept != sorted(sorted(range(6), key=measured.__getitem__)[-2:])  # measured once, others would be kept
    student = student_from(teacher, 2, calibration=calibration())
    assert_same_weights(student, student_from(teacher, layers=kept))


@every_teacher
def test_dead_channels_are_dropped_and_not_missed(name: str) -> None:
    teacher = teacher_of(TEACHERS[name])
    alive = []
    for layer in teacher.base_model.layers:
        order = torch.randperm(48)
        alive.append(order[:40].sort().values)
        for parameter in layer.mlp.gate_proj.parameters():
            parameter.data[order[40:]] = 0.0
    student = student_from(teacher, intermediate_size=40, calibration=calibration())
    assert student.config.intermediate_size == 40
    for index, layer in enumerate(student.base_model.layers):
        mlp = teacher.base_model.layers[index].mlp
        assert torch.equal(layer.mlp.up_proj.weight, mlp.up_proj.weight[alive[index]])
        assert torch.equal(layer.mlp.down_proj.weight, mlp.down_proj.weight[:, alive[index]])
        assert_same_weights(layer.self_attn, teacher.base_model.layers[index].self_attn)
    torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, rtol=1e-4, atol=1e-4)


@every_teacher
def test_dead_key_value_heads_are_dropped_with_their_query_heads(name: str) -> None:
    teacher = teacher_of(TEACHERS[name])
    size = teacher.base_model.layers[0].self_attn.head_dim
    for index, layer in enumerate(teacher.base_model.layers):
        for parameter in layer.self_attn.v_proj.parameters():
            parameter.data.view(2, size, -1)[index % 2] = 0.0
    student = student_from(teacher, num_key_value_heads=1, calibration=calibration())
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert student.config.head_dim == size
    for index, layer in enumerate(student.base_model.layers):
        attention, kept = teacher.base_model.layers[index].self_attn, 1 - index % 2
        for kind, rows in (("q", 2 * size), ("k", size), ("v", size)):
            expected = getattr(attention, f"{kind}_proj").weight[kept * rows :][:rows]
            assert torch.equal(getattr(layer.self_attn, f"{kind}_proj").weight, expected), kind
        assert torch.equal(layer.self_attn.o_proj.weight, attention.o_proj.weight[:, kept * 2 * size :][:, : 2 * size])
    torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_widths_are_measured_without_the_layers_that_go() -> None:
    teacher = teacher_of(TEACHERS["whisper_lm"])
    shallow = student_from(teacher, layers=[1, 3])
    widths = {"intermediate_size": 24, "num_key_value_heads": 1, "calibration": calibration()}
    assert_same_weights(student_from(teacher, layers=[1, 3], **widths), student_from(shallow, **widths))


@every_teacher
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_cut_in_every_way_survives_saving(name: str, dtype: torch.dtype, tmp_path) -> None:
    teacher = teacher_of(TEACHERS[name], dtype)
    student = student_from(teacher, 2, intermediate_size=20, num_key_value_heads=1, calibration=calibration())
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(teacher)
    assert loaded.dtype == dtype
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    assert loaded.generation_config.eos_token_id == [2, 3]
    assert len(loaded.generate(tokens(1, 5), do_sample=False, min_new_tokens=7)[0]) == 12
    student(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_each_layer_keeps_its_type() -> None:
    teacher = teacher_of(TEACHERS["whisper_lm"])
    student = student_from(with_no_op(teacher), layers=[0, 1, 3])
    assert student.config.layer_types == [FULL_ATTENTION, MASKED_SPARSE_ATTENTION, MASKED_SPARSE_ATTENTION]
    assert [layer.self_attn.is_sparse for layer in student.model.layers] == [False, True, True]
    expected = teacher(tokens()).logits
    assert torch.equal(student(tokens()).logits, expected)
    student.model.layers[1].self_attn.is_sparse = False
    assert not torch.equal(student(tokens()).logits, expected)  # types matter at this length


def test_all_lists_by_layer_are_cut_and_no_others() -> None:
    rope = [1, 0, 0, 1]
    config = SmolLM3Config(**{**DEEP, "eos_token_id": [2, 3, 4, 5]}, no_rope_layers=rope, layer_types=None)
    student = student_from(teacher_of(config), layers=[0, 2, 3])
    assert student.config.no_rope_layers == [1, 0, 1]
    assert len(student.config.layer_types) == 3
    assert student.config.eos_token_id == [2, 3, 4, 5]


def test_norms_over_all_heads_lose_the_same_heads() -> None:
    teacher = teacher_of(Olmo2Config(**DEEP))
    student = student_from(teacher, num_key_value_heads=1, calibration=calibration())
    attention, whole = (model.model.layers[0].self_attn for model in (student, teacher))
    kept = (whole.k_proj.weight[:8] != attention.k_proj.weight).any()
    assert torch.equal(attention.q_norm.weight, whole.q_norm.weight[16 * kept :][:16])


def test_the_attention_implementation_is_kept() -> None:
    teacher = AutoModelForCausalLM.from_config(TEACHERS["mistral"], attn_implementation="masked_sparse")
    assert student_from(teacher, layers=[0]).config._attn_implementation == "masked_sparse"


def test_a_folder_is_a_teacher_in_its_own_dtype(tmp_path) -> None:
    teacher = teacher_of(TEACHERS["qwen3"], torch.bfloat16)
    teacher.save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        student = student_from(folder, layers=[1])
        assert student.dtype == torch.bfloat16
        assert_same_weights(student, student_from(teacher, layers=[1]))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", ["whisper_lm", "llama with biases"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_the_calibration_does_not_matter(name: str, importance: str, side: str) -> None:
    teacher = teacher_of(TEACHERS[name])
    short, long = tokens(1, 70)[0], tokens(2, 80)[1]
    padding, visible = torch.full((10,), 7), torch.ones(70, dtype=torch.int64)
    hidden = torch.zeros_like(padding)
    padded = torch.cat((padding, short) if side == "left" else (short, padding))
    mask = torch.cat((hidden, visible) if side == "left" else (visible, hidden))
    batch = {"input_ids": torch.stack((padded, long)), "attention_mask": torch.stack((mask, torch.ones_like(mask)))}
    batch["labels"] = "ignored"
    measured = layer_importance(teacher, [batch], importance)
    assert measured == pytest.approx(layer_importance(teacher, [short, long], importance), abs=1e-5)
    sizes = {"intermediate_size": 20, "num_key_value_heads": 1, "importance": importance}
    student = student_from(teacher, 2, calibration=[batch], **sizes)
    assert_same_weights(student, student_from(teacher, 2, calibration=[short, long], **sizes))


def test_calibration_may_be_lists_arrays_or_a_generator() -> None:
    teacher = teacher_of(TEACHERS["whisper_lm"])
    expected = layer_importance(teacher, [tokens(2, 80)])
    for item in (tokens(2, 80).tolist(), tokens(2, 80).numpy(), tokens(2, 80).int(), {"input_ids": tokens(2, 80)}):
        assert layer_importance(teacher, (one for one in [item])) == expected
    assert layer_importance(teacher, tokens(2, 80)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_dropout_is_off_while_measuring(importance: str) -> None:
    teacher = teacher_of(LlamaConfig(**DEEP, attention_dropout=0.5))
    expected = layer_importance(teacher, calibration(), importance)
    assert layer_importance(teacher.train(), calibration(), importance) == expected


@pytest.mark.parametrize("fails", [False, True])
def test_the_teacher_does_not_notice(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(TEACHERS["whisper_lm"]).train()
    teacher.model.norm.eval()
    teacher.config.output_hidden_states = True

    def state() -> list:
        weights = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
        modules = [(module, module.training, len(module._forward_hooks)) for module in teacher.modules()]
        return [weights, modules, teacher.config.to_dict(), torch.get_rng_state(), torch.is_grad_enabled()]

    before = state()
    if fails:
        monkeypatch.setattr(teacher.model.layers[3], "forward", fail)
    for importance in IMPORTANCES:
        options = {"intermediate_size": 20, "calibration": calibration(), "importance": importance}
        if fails:
            with pytest.raises(OSError, match="no memory"):
                student_from(teacher, 2, **options)
        else:
            student_from(teacher, 2, **options)
    after = state()
    assert before[1:3] == after[1:3]
    torch.testing.assert_close([before[0], *before[3:]], [after[0], *after[3:]], rtol=0, atol=0)


def fail(*_: object, **__: object) -> None:
    raise OSError("no memory")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_hidden_layers": 2, "layers": [0, 1]}, ["num_hidden_layers=2 and layers=[0, 1]", "one of them"]),
        ({"layers": []}, ["strictly increasing indices below 4", "got []"]),
        ({"layers": [1, 1]}, ["got [1, 1]"]),
        ({"layers": [2, 1]}, ["got [2, 1]"]),
        ({"layers": [-1, 1]}, ["got [-1, 1]"]),
        ({"layers": [1, 4]}, ["got [1, 4]"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "from 1 to 4", "got 0"]),
        ({"num_hidden_layers": 5}, ["got 5"]),
        ({"num_hidden_layers": True}, ["got True"]),
        ({"intermediate_size": 49}, ["intermediate_size", "from 1 to 48", "got 49"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "from 1 to 2", "got 3"]),
        ({"importance": "magnitude"}, ["'magnitude'", "perplexity", "block_influence"]),
        ({"num_hidden_layers": 3}, ["calibration", "got NoneType", "[B, T] int64"]),
        ({"intermediate_size": 3}, ["calibration", "got NoneType"]),
        ({"num_key_value_heads": 1}, ["calibration", "got NoneType"]),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_refused(options: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match="got") as error:
        student_from(teacher_of(TEACHERS["mistral"]), **options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, ["got NoneType"]),
        ("text", ["got str"]),
        ({"input_ids": tokens()}, ["got dict", "list"]),
        ([], ["got 0 items"]),
        (["text"], ["got str"]),
        ([{"text": 1}], ["got dict"]),
        ([[[3, 4], [5]]], ["got list", "[B, T] int64"]),
        ([tokens().float()], ["float32", "integers"]),
        ([tokens()[None]], ["[1, 2, 160]"]),
        ([{"input_ids": [3, 4, 5], "attention_mask": [1, 1]}], ["[1, 3]", "[1, 2]"]),
        ([3, 4, 5], ["two visible tokens in a row", "got 3 items"]),
        ([{"input_ids": [3, 4, 5], "attention_mask": [1, 0, 1]}], ["two visible tokens in a row", "got 1 items"]),
        ([[3, VOCABULARY]], [f"below vocab_size={VOCABULARY}", "3 to 120", "tokenizer"]),
        ([[3, -1]], ["got -1 to 3"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_calibration_that_is_none_is_refused(calibration: object, words: list[str]) -> None:
    with pytest.raises(ValueError, match="got") as error:
        layer_importance(teacher_of(TEACHERS["mistral"]), calibration)
    assert all(word in str(error.value) for word in words), str(error.value)


SMALL = {key: value for key, value in DEEP.items() if key != "initializer_range"}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Linear(2, 2), ["got Linear", "AutoModelForCausalLM"]),
        (lambda: LlamaModel(TEACHERS["llama with biases"]), ["got LlamaModel"]),
        (lambda: teacher_of(GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2)), ["got GPT2LMHeadModel"]),
        (lambda: teacher_of(MixtralConfig(**SMALL)), ["layers.3.mlp.gate_proj", "choose a Llama"]),
        (lambda: teacher_of(XGLMConfig(vocab_size=9, d_model=16, num_layers=1, attention_heads=2)), ["layers.0.mlp"]),
        (lambda: teacher_of(TEACHERS["mistral"]).to("meta"), ["one device", "['meta']"]),
    ],
)
def test_teachers_of_another_shape_are_refused(build: Callable, words: list[str]) -> None:
    with pytest.raises(ValueError, match="got") as error:
        student_from(build(), 1, calibration=calibration())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_head_counts_that_the_family_cannot_represent_are_refused() -> None:
    teacher = teacher_of(LlamaConfig(**{**DEEP, "num_key_value_heads": 4}))
    with pytest.raises(
        ValueError, match=r"LlamaConfig cannot represent num_key_value_heads, got 3 .*hidden size.*from_dense"
    ):
        student_from(teacher, num_key_value_heads=3, calibration=calibration())
    student = student_from(from_dense(teacher), num_key_value_heads=3, calibration=calibration())
    assert (student.config.num_attention_heads, student.config.head_dim) == (3, 8)


def test_quantized_teachers_are_refused_before_they_are_loaded(tmp_path) -> None:
    teacher = teacher_of(TEACHERS["qwen3"])
    teacher.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    teacher.config.save_pretrained(tmp_path)
    for source in (teacher, tmp_path):
        with pytest.raises(ValueError, match=r"quantization_config.*full-precision"):
            student_from(source, layers=[0])


def test_importance_refuses_what_students_refuse() -> None:
    with pytest.raises(ValueError, match=r"got 'magnitude'; choose one of \['perplexity', 'block_influence'\]"):
        layer_importance(teacher_of(TEACHERS["mistral"]), calibration(), "magnitude")
    with pytest.raises(ValueError, match=r"got Linear"):
        layer_importance(nn.Linear(2, 2), calibration())


def test_a_loss_that_is_no_number_is_refused() -> None:
    teacher = teacher_of(TEACHERS["mistral"])
    teacher.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"finite, got nan"):
        layer_importance(teacher, calibration())
