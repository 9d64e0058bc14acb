"""The fused head of a language model: what is done to the head counts, and whoever trains on logits all the same is told why, once."""

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.modules import module as modules
from torch.nn.utils import prune

from devices import DEVICE
from largemargin import large_margin_cross_entropy
from largemargin.integrations.transformers import LargeMarginLoss, fuse_large_margin_loss
from largemargin.lab._torchvision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # which transformers imports where it is installed
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("device"),  # where models and tokens are
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # which torch.compile asks for
    pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning"),
]

VOCABULARY = 64
TOKENS = torch.arange(32, device=DEVICE).view(2, 16) * 7 % VOCABULARY
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **SIZES)).to(DEVICE)


def expected_of(model) -> torch.Tensor:
    return LargeMarginLoss(causal=True)(model(input_ids=TOKENS), TOKENS)


def told(loss) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss.backward()
    return [str(warning.message) for warning in said if "fused head" in str(warning.message)]


def loaded(folder) -> torch.nn.Module:
    llama().save_pretrained(folder)
    return fuse_large_margin_loss(transformers.LlamaForCausalLM.from_pretrained(folder).to(DEVICE))


def test_a_loaded_model_that_is_not_set_to_train_is_told_once(tmp_path):
    model = loaded(tmp_path)
    with torch.no_grad():
        assert model(TOKENS, labels=TOKENS).logits.shape == (2, 16, VOCABULARY)  # evaluation wants them
    outputs = model(TOKENS, labels=TOKENS)
    assert outputs.logits.shape == (2, 16, VOCABULARY)
    (message,) = told(outputs.loss)
    assert "evaluation mode" in message and "model.train()" in message
    assert told(model(TOKENS, labels=TOKENS).loss) == []
    outputs = model.train()(TOKENS, labels=TOKENS)
    assert outputs.logits.numel() == 0 and told(outputs.loss) == []


def test_labels_by_position_are_told():
    model = fuse_large_margin_loss(llama()).train()
    (message,) = told(model(TOKENS, None, None, None, None, TOKENS).loss)
    assert "by position" in message


def test_a_head_that_is_replaced_is_told():
    model = fuse_large_margin_loss(llama()).train()
    model.resize_token_embeddings(80)
    outputs = model(TOKENS, labels=TOKENS)
    torch.testing.assert_close(outputs.loss, expected_of(model))
    (message,) = told(outputs.loss)
    assert "resize_token_embeddings" in message and "again" in message


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options))


def test_a_model_whose_adapter_was_merged_is_told():
    model = fuse_large_margin_loss(adapted(llama(), target_modules=["q_proj"])).train()
    assert model(input_ids=TOKENS, labels=TOKENS).logits.numel() == 0
    merged = model.merge_and_unload().train().requires_grad_()
    outputs = merged(input_ids=TOKENS, labels=TOKENS)
    torch.testing.assert_close(outputs.loss, expected_of(merged))
    (message,) = told(outputs.loss)
    assert "merge_and_unload" in message and "again" in message
    outputs = fuse_large_margin_loss(merged)(input_ids=TOKENS, labels=TOKENS)
    assert outputs.logits.numel() == 0 and told(outputs.loss) == []


def test_a_model_whose_adapter_was_merged_stays_fused_where_it_was_fused_itself():
    inner = fuse_large_margin_loss(llama())
    merged = adapted(inner, target_modules=["q_proj"]).merge_and_unload().train().requires_grad_()
    outputs = merged(input_ids=TOKENS, labels=TOKENS)
    torch.testing.assert_close(outputs.loss, expected_of(merged))
    assert outputs.logits.numel() == 0 and told(outputs.loss) == []


def test_an_adapter_of_the_head_trains():
    model = adapted(fuse_large_margin_loss(llama()), target_modules=["q_proj", "lm_head"]).train()
    outputs = model(input_ids=TOKENS, labels=TOKENS)
    torch.testing.assert_close(outputs.loss, expected_of(model))
    (message,) = told(outputs.loss)
    assert "peft.tuners.lora" in message
    gradients = {name: weight.grad for name, weight in model.named_parameters() if "lora" in name and "lm_head" in name}
    assert len(gradients) == 2 and all(gradient.norm() > 0 for gradient in gradients.values())
    with pytest.raises(
        ValueError, match=r"whose head is a peft\..*forward of its own; fuse the model before the adapters are added, or use"
    ):
        fuse_large_margin_loss(model)


def triple(head) -> None:
    original = head.forward
    head.forward = lambda features: 3 * original(features)


def triple_behind_accelerate(head) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(head, hooks.AlignDevicesHook(execution_device=DEVICE))
    triple(head)


def triple_by_accelerate(head) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Triple(hooks.ModelHook):
        def post_forward(self, module, output):
            return 3 * output

    hooks.add_hook_to_module(head, Triple())


class Tagged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return 3 * result if function is torch.nn.functional.linear else result


def weight_of_a_subclass(head) -> None:
    weight = head.weight.detach().as_subclass(Tagged)
    del head.weight
    head.weight = weight


def compile_it(head) -> None:
    head.compile(backend="eager")


def watch_gradients(head) -> None:
    head.register_full_backward_hook(lambda *_: None)


def watch_gradients_before(head) -> None:
    head.register_full_backward_pre_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [
        triple, triple_behind_accelerate, triple_by_accelerate, weight_of_a_subclass, compile_it, watch_gradients, watch_gradients_before,
        torch.nn.Sequential,
    ],
)  # fmt: skip
def test_what_replaces_the_forward_of_a_fused_head_counts(change):
    model = fuse_large_margin_loss(llama()).train()
    model.lm_head = change(model.lm_head) or model.lm_head
    outputs = model(TOKENS, labels=TOKENS)
    torch.testing.assert_close(outputs.loss, expected_of(model))
    assert outputs.logits.shape == (2, 16, VOCABULARY)
    (message,) = told(outputs.loss)
    assert "the head" in message


GLOBAL_HOOKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "forward": (modules.register_module_forward_hook, lambda args, output: 3 * output),
    "forward pre": (modules.register_module_forward_pre_hook, lambda args: (3 * args[0],)),
    "full backward": (modules.register_module_full_backward_hook, lambda *_: None),
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hooks_see_a_fused_head(kind):
    model = fuse_large_margin_loss(llama()).train()
    register, hook = GLOBAL_HOOKS[kind]
    handle = register(lambda module, *args: hook(*args) if module is model.lm_head else None)
    try:
        outputs = model(TOKENS, labels=TOKENS)
        torch.testing.assert_close(outputs.loss, expected_of(model))
        assert len(told(outputs.loss)) == (0 if kind == "forward pre" else 1)
    finally:
        handle.remove()


@pytest.mark.parametrize("change", [triple, triple_behind_accelerate, triple_by_accelerate])
def test_a_head_whose_forward_is_replaced_is_not_fused(change):
    model = llama()
    change(model.lm_head)
    with pytest.raises(ValueError, match="whose head has had its forward replaced"):
        fuse_large_margin_loss(model)


def test_pruning_and_normalising_a_fused_head_count():
    for change in (
        lambda head: prune.random_unstructured(head, "weight", 0.5),
        torch.nn.utils.parametrizations.weight_norm,
    ):
        model = fuse_large_margin_loss(llama()).train()
        change(model.lm_head)
        outputs = model(TOKENS, labels=TOKENS)
        torch.testing.assert_close(outputs.loss, expected_of(model))
        assert told(outputs.loss) == []


def test_copies_tell_for_themselves(tmp_path):
    model = loaded(tmp_path)
    copied = copy.deepcopy(model)
    assert len(told(model(TOKENS, labels=TOKENS).loss)) == 1
    assert len(told(copied(TOKENS, labels=TOKENS).loss)) == 1


def arguments(folder, **options):
    return transformers.TrainingArguments(
        str(folder),
        use_cpu=DEVICE.type == "cpu",
        report_to="none",
        save_strategy="no",
        max_steps=1,
        per_device_train_batch_size=2,
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainers_label_smoothing_is_not_ignored(smoothing, wrapped, tmp_path):
    loss = LargeMarginLoss(causal=True)
    function = (lambda outputs, labels, num_items_in_batch=None: loss(outputs, labels, num_items_in_batch)) if wrapped else loss
    data = [{"input_ids": row, "labels": row} for row in TOKENS.cpu()]
    trainer = transformers.Trainer(
        llama(), arguments(tmp_path, label_smoothing_factor=smoothing), train_dataset=data, compute_loss_func=function
    )
    if not smoothing:
        trainer.train()
        return
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0.*got 0\.1.*LargeMarginLoss\(label_smoothing=0\.1\)"):
        trainer.train()


# dense prediction


def test_who_leaves_out_the_loss_of_routers_is_told_once():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(vocab_size=VOCABULARY, num_local_experts=2, output_router_logits=True, **SIZES)
    model = transformers.MixtralForCausalLM(config).to(DEVICE).train()
    outputs, loss = model(input_ids=TOKENS), LargeMarginLoss(causal=True)
    with pytest.warns(UserWarning, match=r"leaves out the aux_loss .* fuse_large_margin_loss") as said:
        of_tokens = loss(outputs, TOKENS)
        loss(outputs, TOKENS)
    assert len(said) == 1
    whole = fuse_large_margin_loss(model)(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(whole, of_tokens + config.router_aux_loss_coef * outputs.aux_loss)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # in evaluation nothing is trained
        LargeMarginLoss(causal=True)(model(input_ids=TOKENS), TOKENS)


def segformer() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "decoder_hidden_size": 8, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    dropout = {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=5, **sizes, **dropout))


def images(rng) -> list[dict[str, torch.Tensor]]:
    labels = torch.randint(5, (4, 32, 32), generator=rng)
    labels[:, :5] = -100
    return [{"pixel_values": torch.randn(3, 32, 32, generator=rng), "labels": label} for label in labels]


def test_dense_prediction_is_upsampled_as_by_the_model(rng, device, tmp_path):
    model, data = segformer().to(device), images(rng)
    pixels, labels = (torch.stack([row[name] for row in data]).to(device) for name in ("pixel_values", "labels"))
    outputs = model(pixels)
    assert outputs.logits.shape == (4, 5, 8, 8)
    # at lam=0 it is the softmax loss, which is the model's own, whose ignored label is 255
    own = model(pixels, labels=torch.where(labels < 0, 255, labels)).loss
    torch.testing.assert_close(LargeMarginLoss(lam=0.0, upsample="bilinear")(outputs, labels), own)
    enlarged = torch.nn.functional.interpolate(outputs.logits, (32, 32), mode="bilinear")
    expected = large_margin_cross_entropy(enlarged, labels, reduction="sum")
    torch.testing.assert_close(LargeMarginLoss(upsample="bilinear")(outputs, labels, 7), expected / 7)
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=data, compute_loss_func=LargeMarginLoss(upsample="bilinear"))
    assert trainer.train().training_loss > 0


def test_logits_of_the_size_of_the_labels_are_left_alone(rng, device):
    logits, labels = torch.randn(2, 5, 6, 7, generator=rng).to(device), torch.randint(5, (2, 6, 7), generator=rng).to(device)
    torch.testing.assert_close(LargeMarginLoss(upsample="bilinear")(logits, labels), large_margin_cross_entropy(logits, labels))


@pytest.mark.parametrize("size", [(8, 8), (32, 32)])
def test_probabilities_of_dense_prediction_have_their_classes_where_the_logits_have_them(size, rng, device):
    logits = torch.randn(2, 5, *size, generator=rng).to(device)
    labels = torch.randn(2, 5, 32, 32, generator=rng).to(device).softmax(1)
    enlarged = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear")
    torch.testing.assert_close(LargeMarginLoss(upsample="bilinear")(logits, labels), large_margin_cross_entropy(enlarged, labels))
    with pytest.raises(ValueError, match="for dense prediction give LargeMarginLoss"):
        LargeMarginLoss()(logits, labels)


@pytest.mark.parametrize("size", [(8, 8), (32, 32)])
def test_the_error_of_dense_prediction_names_the_option(size, rng):
    with pytest.raises(ValueError, match=r'\(4, 32, 32\); for dense prediction give LargeMarginLoss\(upsample="bilinear"\)'):
        LargeMarginLoss()(torch.randn(4, 5, *size, generator=rng), torch.zeros(4, 32, 32).long())


@pytest.mark.parametrize("options", [{"upsample": "nearest"}, {"upsample": "bilinear", "causal": True}])
def test_mistakes_of_upsample_are_named(options):
    with pytest.raises(ValueError, match="upsample"):
        LargeMarginLoss(**options)
