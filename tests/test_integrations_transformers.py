"""The adapters for the Trainer of transformers: accumulation is a large batch, and the fused head is the unfused loss without logits."""

import contextlib
import copy
import types
from pathlib import Path

import pytest
import torch

from largemargin import large_margin_cross_entropy
from largemargin.integrations.transformers import LargeMarginLoss, fuse_large_margin_loss
from largemargin.lab._torchvision import import_torchvision
from measure import peak_bytes
from ranks import Ranks, script

with contextlib.suppress(ImportError):
    import_torchvision()  # which transformers imports where it is installed
transformers = pytest.importorskip("transformers")
hooks = pytest.importorskip("accelerate.hooks")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*loss_type=None.*"),
]

VOCABULARY = 256
TEXT = torch.tensor(list((Path(__file__).parent.parent / "README.md").read_bytes()[:4096]))


def language_model(vocabulary: int = VOCABULARY, tied: bool = True, family: str = "gpt2") -> torch.nn.Module:
    torch.manual_seed(0)
    tokens = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": tied}
    if family == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, **tokens, **dropout))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    if family == "gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=16, **sizes, **tokens))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **tokens))


def texts(num_rows: int, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Rows of text whose labels are kept more or less, so that micro-batches have unlike numbers of them."""
    rows = TEXT[: num_rows * length].view(num_rows, length)
    labels = rows.clone()
    for i, row in enumerate(labels):
        row[: (7 * i) % length] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def trained(model, data, folder, device, *, batch_size, accumulation, loss=None, steps=3, **options) -> torch.nn.Module:
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=0.3,
        optim="sgd",
        lr_scheduler_type="constant",
        use_cpu=device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    trainer = transformers.Trainer(model, args, train_dataset=data, compute_loss_func=loss)
    trainer.train()
    model.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model


def batch_of(num_rows: int) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in texts(num_rows)]) for name in ("input_ids", "labels")}


def assert_same_weights(model, other, **tolerance) -> None:
    for (name, weight), same in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, same, msg=(name + ": {}").format, **tolerance)


def model_of(kind: str) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]], object]:
    """A model, data and loss for each shape of labels."""
    torch.manual_seed(0)
    if kind in ("causal", "fused"):
        model = language_model()
        return (model, texts(24), LargeMarginLoss(causal=True)) if kind == "causal" else (fuse_large_margin_loss(model), texts(24), None)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32,
    )  # fmt: skip
    data = texts(24)
    if kind == "tokens":
        for row in data:
            row["labels"] = torch.where(row["labels"] < 0, -100, row["labels"] % 5)
        return transformers.BertForTokenClassification(config), data, LargeMarginLoss()
    for i, row in enumerate(data):
        row["labels"] = torch.tensor(i % 5) if kind == "sequences" else torch.softmax(torch.randn(5), 0)
    return transformers.BertForSequenceClassification(config), data, LargeMarginLoss()


@pytest.mark.parametrize("kind", ["sequences", "probabilities", "tokens", "causal", "fused"])
def test_accumulated_micro_batches_are_one_large_batch(kind, tmp_path, device):
    model, data, loss = model_of(kind)
    start = copy.deepcopy(model)
    whole = trained(copy.deepcopy(model), data, tmp_path, device, batch_size=8, accumulation=1, loss=loss)
    parts = trained(model, data, tmp_path, device, batch_size=2, accumulation=4, loss=loss)
    assert_same_weights(parts, whole, rtol=1e-4, atol=1e-5)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    moved = max((a - b.cpu()).abs().max().item() for a, b in zip(start.parameters(), whole.parameters(), strict=True))
    assert moved > 1e-3  # a hundred times the tolerance


def test_a_mean_over_each_micro_batch_would_not_be(tmp_path, device):
    # the law above can fail: labels are unevenly spread
    model, data, loss = model_of("causal")
    whole = trained(copy.deepcopy(model), data, tmp_path, device, batch_size=8, accumulation=1, loss=loss)

    def mean(outputs, labels, num_items_in_batch=None):
        return loss(outputs, labels) / 4

    parts = trained(model, data, tmp_path, device, batch_size=2, accumulation=4, loss=mean)
    with pytest.raises(AssertionError):
        assert_same_weights(parts, whole, rtol=1e-4, atol=1e-5)


def test_loss_of_logits_is_that_of_the_library(rng, device):
    logits, weight = torch.randn(2, 6, 5, generator=rng).to(device), torch.rand(5, generator=rng).to(device)
    labels = torch.tensor([[0, 1, -100, 2, 3, 4], [-100, 4, 3, -100, 1, 0]], device=device)
    tokens = large_margin_cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, lam=0.5, hard_bias=1.0)
    loss = LargeMarginLoss(lam=0.5, hard_bias=1.0, weight=weight)
    torch.testing.assert_close(loss({"logits": logits}, labels), tokens)
    torch.testing.assert_close(loss((logits,), labels), tokens)
    torch.testing.assert_close(loss(logits, labels), tokens)
    following = large_margin_cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(LargeMarginLoss(causal=True)(logits, labels, torch.tensor(7.0)), following / 7)


@pytest.mark.parametrize("labels", ["classes", "probabilities"])
def test_the_number_of_items_is_what_the_trainer_counted(labels, rng, device):
    logits, classes = torch.randn(4, 5, generator=rng).to(device), torch.tensor([0, 1, 2, 3], device=device)
    given, counted = (classes, 4) if labels == "classes" else (torch.nn.functional.one_hot(classes, 5).float(), 20)
    mean = large_margin_cross_entropy(logits, classes)
    torch.testing.assert_close(LargeMarginLoss()(logits, given, counted), mean)
    torch.testing.assert_close(LargeMarginLoss()(logits, given, torch.tensor(2.5 * counted)), mean / 2.5)
    torch.testing.assert_close(LargeMarginLoss()(logits, given, 0.3 * counted), mean / 0.3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integers(dtype):
    tokens = TEXT[:32].view(2, 16)
    model = fuse_large_margin_loss(language_model()).train()
    logits = model(tokens).logits
    torch.testing.assert_close(LargeMarginLoss()(logits, tokens.to(dtype)), LargeMarginLoss()(logits, tokens), rtol=0, atol=0)
    expected = LargeMarginLoss(causal=True)(logits, tokens)
    torch.testing.assert_close(LargeMarginLoss(causal=True)(logits, tokens.to(dtype)), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(tokens, labels=tokens.to(dtype)).loss, expected)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LargeMarginLoss(lam=-1.0), ValueError, "lam"),
        (lambda: LargeMarginLoss(ignore_index=0), TypeError, "ignore_index"),
        (lambda: LargeMarginLoss(reduction="sum"), TypeError, "reduction"),
        (lambda: LargeMarginLoss()(torch.zeros(2, 3), None), ValueError, "labels must be a torch.Tensor"),
        (lambda: LargeMarginLoss()(torch.zeros(2, 3), torch.zeros(3).long()), ValueError, r"labels must have the shape.*\(2, 3\).*\(3,\)"),
        (lambda: LargeMarginLoss(causal=True)(torch.zeros(2, 3), torch.zeros(2, 3)), ValueError, "class indices"),
        (lambda: fuse_large_margin_loss(language_model(), when="never"), ValueError, "when must be one of"),
        (lambda: fuse_large_margin_loss(language_model(), lam=-1.0), ValueError, "lam"),
        (lambda: fuse_large_margin_loss(torch.nn.Linear(2, 2)), ValueError, "got Linear, which has no loss_function"),
        (
            lambda: fuse_large_margin_loss(language_model()).loss_function(torch.zeros(2, 3, 4), torch.zeros(2, 5).long()),
            ValueError,
            r"labels must have the shape of the tokens \(2, 3\), got \(2, 5\)",
        ),
    ],
)
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


class ScaledHead(torch.nn.Linear):
    def forward(self, features):
        return 2 * super().forward(features)


def other_model(kind: str) -> torch.nn.Module:
    """One whose loss or head is another than that of the fused loss."""
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "masked":
        return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes, **tokens, cls_token_id=0, sep_token_id=0))
    if kind == "two heads":
        return transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, **tokens))
    if kind == "encoder":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, **tokens)
        )
    model = language_model()
    model.lm_head = ScaledHead(32, VOCABULARY)
    return model


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("masked", "ModernBertForMaskedLM, whose loss is ForMaskedLMLoss"),
        ("two heads", "GPT2DoubleHeadsModel, whose forward does not call self.loss_function"),
        ("encoder", "T5ForConditionalGeneration, which has an encoder.*decoder_input_ids"),
        ("head", r"GPT2LMHeadModel, whose head is a .*transformers\.ScaledHead"),
    ],
)
def test_a_model_with_another_loss_or_head_is_refused(kind, words):
    with pytest.raises(ValueError, match=words):
        fuse_large_margin_loss(other_model(kind))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_items", [None, 100])
def test_fused_loss_and_gradients_are_those_of_the_logits(family, tied, num_items, device):
    model = language_model(tied=tied, family=family).double().to(device)
    plain = copy.deepcopy(model)
    fuse_large_margin_loss(model, lam=0.5, label_smoothing=0.1)
    batch = {name: value.to(device) for name, value in batch_of(4).items()}
    outputs = model(**batch, **({} if num_items is None else {"num_items_in_batch": num_items}))
    outputs.loss.backward()
    logits = plain(batch["input_ids"]).logits
    expected = LargeMarginLoss(lam=0.5, label_smoothing=0.1, causal=True)(logits, batch["labels"], num_items)
    expected.backward()
    assert outputs.logits.numel() == 0
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-10, atol=0)
    for weight, same in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, same.grad, rtol=1e-8, atol=1e-12)


def test_labels_shifted_by_the_caller_and_another_ignored_label(device):
    model = fuse_large_margin_loss(language_model(family="llama").to(device)).train()
    tokens, following = TEXT[:32].view(2, 16).to(device), TEXT[1:33].view(2, 16).to(device)
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, labels=tokens, shift_labels=following).loss, LargeMarginLoss()(logits, following))
    masked = torch.where(tokens == tokens[0, 3], -100, tokens)
    ignoring = model.loss_function(logits=logits, labels=tokens, vocab_size=VOCABULARY, ignore_index=int(tokens[0, 3]))
    torch.testing.assert_close(ignoring, LargeMarginLoss(causal=True)(logits, masked))


def test_under_autocast_the_head_multiplies_in_its_dtype():
    model = fuse_large_margin_loss(language_model(tied=False, family="llama")).train()
    tokens = TEXT[:32].view(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        features, loss = model.model(tokens).last_hidden_state, model(tokens, labels=tokens).loss
    logits = features.bfloat16().float() @ model.lm_head.weight.bfloat16().float().t()
    torch.testing.assert_close(loss, LargeMarginLoss(causal=True)(logits, tokens), rtol=1e-6, atol=0)
    loss.backward()
    fused = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        unfused = LargeMarginLoss(causal=True)(model(tokens), tokens)
    unfused.backward()
    for name, weight in model.named_parameters():
        assert fused[name].dtype == torch.float32
        assert (fused[name] - weight.grad).norm() < 0.02 * weight.grad.norm(), name  # five roundings of bfloat16
    model.double()
    with torch.autocast("cpu", torch.bfloat16):
        double = model(tokens, labels=tokens).loss
    torch.testing.assert_close(double, model(tokens, labels=tokens).loss, rtol=1e-10, atol=0)  # autocast leaves it alone
    assert model.to("meta")(tokens.to("meta"), labels=tokens.to("meta")).loss.shape == ()  # which has no autocast


def test_a_head_with_a_bias_and_checkpointing(device):
    model = language_model(tied=False)
    model.lm_head = torch.nn.Linear(32, VOCABULARY)
    model.to(device)
    plain = copy.deepcopy(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name from version 5.23 on
    batch = torch.stack([row["input_ids"] for row in texts(4)]).to(device)
    fuse_large_margin_loss(model).train()(batch, labels=batch).loss.backward()
    LargeMarginLoss(causal=True)(plain(batch), batch).backward()
    for weight, same in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, same.grad, rtol=1e-4, atol=1e-6)


def test_training_fused_is_training_unfused(tmp_path, device):
    data, options = texts(64), {"batch_size": 4, "accumulation": 2, "steps": 8}
    model = language_model()
    unfused = trained(copy.deepcopy(model), data, tmp_path, device, loss=LargeMarginLoss(causal=True), **options)
    fused = trained(fuse_large_margin_loss(model), data, tmp_path, device, **options)
    assert fused.losses == pytest.approx(unfused.losses, rel=1e-4)
    assert fused.losses[-1] < fused.losses[0] - 0.5
    assert_same_weights(fused, unfused, rtol=1e-3, atol=1e-4)


def test_fused_holds_no_logits():
    vocabulary, tokens = 20_000, torch.randint(20_000, (32, 64), generator=torch.Generator().manual_seed(0))
    logits = 4 * tokens.numel() * vocabulary
    model = language_model(vocabulary)
    plain = copy.deepcopy(model)
    fuse_large_margin_loss(model)

    def step(of: torch.nn.Module) -> None:
        loss = of(tokens, labels=tokens).loss if of is model else LargeMarginLoss(causal=True)(of(tokens), tokens)
        loss.backward()
        of.zero_grad()

    for of in (model, plain):
        step(of)
    fused, unfused = peak_bytes(lambda: step(model)), peak_bytes(lambda: step(plain))
    assert unfused > 2 * logits  # and their gradient
    assert fused < 0.6 * logits  # a tile of them


def test_logits_are_there_where_they_are_wanted(device):
    model = fuse_large_margin_loss(language_model().to(device))
    tokens = TEXT[:32].view(2, 16).to(device)
    assert model.lm_head(torch.zeros(1, 4, 32, device=device)).shape == (1, 4, VOCABULARY)
    assert model.train()(tokens, labels=tokens).logits.shape == (2, 0, VOCABULARY)
    assert model(tokens).logits.shape == (2, 16, VOCABULARY)
    evaluated = model.eval()(tokens, labels=tokens)
    assert evaluated.logits.shape == (2, 16, VOCABULARY)
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 18)
    assert fuse_large_margin_loss(model, when="always") is model
    always = model(tokens, labels=tokens)
    assert always.logits.shape == (2, 0, VOCABULARY)
    torch.testing.assert_close(always.loss, evaluated.loss)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens, labels=tokens).loss, evaluated.loss)


@pytest.mark.parametrize("what", ["model", "forward"])  # the hooks of a model are compiled, or run before and after the compiled code
def test_compiled_code_makes_logits(what):
    model = fuse_large_margin_loss(language_model(family="llama")).train()
    plain, compiled = copy.deepcopy(model), model
    if what == "model":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    tokens = TEXT[:32].view(2, 16)
    expected = LargeMarginLoss(causal=True)(plain(tokens), tokens)
    expected.backward()
    for again in (False, True):
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=again):
            outputs = compiled(tokens, labels=tokens)
        outputs.loss.backward()
        assert outputs.logits.shape == (2, 16, VOCABULARY)
        torch.testing.assert_close(outputs.loss, expected)
        for weight, same in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, same.grad)


def test_labels_by_position_make_logits():
    model = fuse_large_margin_loss(language_model(family="llama")).train()
    tokens = TEXT[:32].view(2, 16)
    outputs = model(tokens, None, None, None, None, tokens, num_items_in_batch=30)
    assert outputs.logits.shape == (2, 16, VOCABULARY)
    torch.testing.assert_close(outputs.loss, LargeMarginLoss(causal=True)(outputs, tokens, 30))


def test_the_loss_is_on_the_device_of_the_head():
    model = language_model(tied=False, family="llama").train()
    # as device_map puts it on another GPU than the body
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="meta"))
    tokens = TEXT[:32].view(2, 16)
    weight = torch.ones(VOCABULARY)
    assert model(tokens, labels=tokens).loss.device.type == "meta"
    outputs = fuse_large_margin_loss(model, weight=weight)(tokens, labels=tokens, num_items_in_batch=torch.tensor(30))
    assert outputs.logits.shape == (2, 0, VOCABULARY)
    assert outputs.loss.device.type == "meta"


@pytest.mark.parametrize("more", [False, True])  # hooks of accelerate on the same module
def test_a_head_that_accelerate_offloads_is_refused(more):
    model = fuse_large_margin_loss(language_model(tied=False, family="llama")).train()
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    if more:
        hooks.add_hook_to_module(model.lm_head, hooks.ModelHook(), append=True)
    tokens = TEXT[:32].view(2, 16)
    assert model(tokens).logits.shape == (2, 16, VOCABULARY)
    with pytest.raises(ValueError, match=r"weight of the head must stay.*offloads.*device_map"):
        model(tokens, labels=tokens)


class Adapter(torch.nn.Module):
    """As PEFT's: the hooks of what it wraps run."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> torch.nn.Module:
        return self.model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class OlderAdapter(Adapter):
    """As older PEFT's: the forward pass of what it wraps, past its hooks."""

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


def test_a_model_that_is_wrapped_stays_fused_where_its_hooks_run():
    tokens = TEXT[:32].view(2, 16)
    model = fuse_large_margin_loss(language_model()).train()
    fused, unfused = (adapter(model)(tokens, labels=tokens) for adapter in (Adapter, OlderAdapter))
    assert fused.logits.shape == (2, 0, VOCABULARY)
    assert unfused.logits.shape == (2, 16, VOCABULARY)
    torch.testing.assert_close(fused.loss, unfused.loss)


@pytest.mark.parametrize("adapter", [Adapter, OlderAdapter])
def test_fusing_again_is_fusing_what_the_model_has_become(adapter):
    tokens = TEXT[:32].view(2, 16) % 80
    model = language_model().train()
    assert fuse_large_margin_loss(adapter(model))(tokens, labels=tokens).logits.shape == (2, 0, VOCABULARY)
    assert fuse_large_margin_loss(model)(tokens, labels=tokens).logits.shape == (2, 0, VOCABULARY)
    model.resize_token_embeddings(80)
    logits = model(tokens).logits
    copied = copy.deepcopy(model)
    for wrapped in (model, adapter(model), adapter(copied), copied):
        again = fuse_large_margin_loss(wrapped, lam=1.0)(tokens, labels=tokens)
        assert again.logits.shape == (2, 0, 80)
        torch.testing.assert_close(again.loss, LargeMarginLoss(lam=1.0, causal=True)(logits, tokens))
        assert wrapped(tokens).logits.shape == (2, 16, 80)
    assert fuse_large_margin_loss(adapter(model))(tokens, labels=tokens).logits.shape == (2, 0, 80)  # the copy's hooks are its own


def test_an_error_in_between_leaves_the_model_as_it_was():
    model = fuse_large_margin_loss(language_model()).train()
    with pytest.raises(IndexError):
        model(torch.full((1, 4), VOCABULARY), labels=torch.zeros(1, 4).long())
    assert model.lm_head(torch.zeros(1, 4, 32)).shape == (1, 4, VOCABULARY)
    assert model(TEXT[:8].view(1, 8)).logits.shape == (1, 8, VOCABULARY)


def test_a_model_that_caps_its_logits_is_refused():
    model = fuse_large_margin_loss(language_model(family="gemma2"))
    with pytest.raises(ValueError, match="soft-capping"):
        model.train()(TEXT[:8].view(1, 8), labels=TEXT[:8].view(1, 8))


def mask(head, args, logits):
    logits[:, :, [3, 4]] = -100.0


def scale(head, args, logits):
    return 5 * logits


def observe(head, args, logits):
    assert logits.shape == (1, 0, VOCABULARY)


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("hook", [mask, scale, observe])
def test_a_hook_that_changes_logits_is_refused(hook, fused_first):
    model, tokens = language_model().train(), TEXT[:8].view(1, 8)
    steps = [fuse_large_margin_loss, lambda model: model.lm_head.register_forward_hook(hook)]
    for step in steps if fused_first else reversed(steps):
        step(model)
    refused = pytest.raises(ValueError, match=rf"the head has a forward hook, {hook.__name__}, .*a scale.*masked tokens")
    with contextlib.nullcontext() if hook is observe else refused:
        model(tokens, labels=tokens)


def softmax_loss_of_its_own(self, input_ids, labels=None, **others):
    """As Liger's kernel: neither head nor loss_function is called."""
    logits = self.model(input_ids).last_hidden_state @ self.lm_head.weight.t()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("adapter", [lambda model: model, Adapter, OlderAdapter])
def test_a_forward_pass_with_a_loss_of_its_own_is_refused(adapter, training):
    inner, tokens = language_model(family="llama"), TEXT[:32].view(2, 16)
    model = fuse_large_margin_loss(adapter(inner)).train(training)
    inner.forward = types.MethodType(softmax_loss_of_its_own, inner)
    with pytest.raises(ValueError, match=r"must call self\.loss_function.*use_liger_kernel"):
        model(tokens, labels=tokens)
    del inner.forward
    model(tokens, labels=tokens)


def test_replicas_in_threads_do_not_disturb_each_other():
    # of nn.DataParallel: shallow copies of one model, which share its hooks
    model, tokens = language_model().train(), TEXT[:32].view(2, 16)

    def begin_another(model, args, outputs):
        with pytest.raises(IndexError):
            replica(torch.full((1, 4), VOCABULARY), labels=torch.zeros(1, 4).long())

    model.register_forward_hook(begin_another)
    fuse_large_margin_loss(model)
    replica = model._replicate_for_data_parallel()
    assert model(tokens, labels=tokens).logits.shape == (2, 0, VOCABULARY)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"loss": LargeMarginLoss(causal=True)}])
def test_labels_that_the_trainer_holds_back_are_missed(options, tmp_path, device):
    with pytest.raises(ValueError, match=r"labels must be given.*compute_loss_func and label_smoothing_factor"):
        trained(fuse_large_margin_loss(language_model()), texts(4), tmp_path, device, batch_size=2, accumulation=1, **options)


ON_RANKS = """
import contextlib, copy
import pytest, torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from largemargin.integrations.transformers import fuse_large_margin_loss
from largemargin.lab._torchvision import import_torchvision
with contextlib.suppress(ImportError):
    import_torchvision()
import transformers

mesh = distributed.init_device_mesh("cpu", (2,))
tokens = torch.arange(64).view(4, 16) * 7 % 64
mine = tokens.chunk(2)[distributed.get_rank()]
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
torch.manual_seed(0)
whole = fuse_large_margin_loss(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))).train()
parts = [copy.deepcopy(whole) for _ in range(3)]
whole(tokens, labels=tokens).loss.backward()
for model, reshard in zip(parts, (None, False, True)):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if reshard is not None:
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    if reshard:
        with pytest.raises(ValueError, match="weight of the head must be whole.*DTensor.*fully_shard"):
            model(mine, labels=mine)
        continue
    outputs = model(mine, labels=mine)
    assert outputs.logits.numel() == 0
    outputs.loss.backward()
    for weight, same in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(weight.grad.full_tensor(), same.grad)
sharded = copy.deepcopy(whole)
parallelize_module(sharded.lm_head, mesh, ColwiseParallel())
with pytest.raises(ValueError, match="it cannot be tensor parallel"):
    sharded(mine, labels=mine)
"""


@pytest.mark.xdist_group("ranks")
def test_two_shards_of_a_model_have_the_gradients_of_the_whole():
    ranks = Ranks(2)
    try:
        ranks.assert_on(2, script, ON_RANKS)
    finally:
        ranks.stop()


def test_evaluation_of_the_trainer(tmp_path, device):
    model = fuse_large_margin_loss(language_model())
    args = transformers.TrainingArguments(
        str(tmp_path), use_cpu=device.type == "cpu", report_to="none", per_device_eval_batch_size=4, disable_tqdm=True
    )
    found = {}

    def shapes(prediction):
        found["logits"] = prediction.predictions.shape
        return {}

    trainer = transformers.Trainer(model, args, eval_dataset=texts(4), compute_metrics=shapes)
    loss = trainer.evaluate()["eval_loss"]
    batch = {name: value.to(device) for name, value in batch_of(4).items()}
    logits = model(batch["input_ids"]).logits
    kept = (batch["labels"] >= 0).sum()  # GPT2's are counted before the shift by some versions
    shifted = (batch["labels"][:, 1:] >= 0).sum()
    sums = LargeMarginLoss(causal=True)(logits, batch["labels"], 1).item()
    assert found["logits"] == (4, 16, VOCABULARY)
    assert any(loss == pytest.approx(sums / count.item(), rel=1e-5) for count in (kept, shifted))
