import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
from networks import fill
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import tiny_ddpm, tiny_lora, tiny_stable_diffusion, tiny_tokenizer

from influence import adapters, keys
from influence.errors import ModelError
from influence.models import add_fresh_lora, load_denoiser, save_denoiser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    tiny_ddpm(path / "ddpm")
    tiny_stable_diffusion(path / "sd")
    tiny_lora(path / "sd", path / "lora")
    return path


def pixels(n, size, channels=3):
    return torch.from_numpy(keys.normal(("pixels", n), (n, channels, size, size))).clamp(-1, 1)


@torch.no_grad()
def test_an_unconditional_network_equals_the_unet_of_the_folder(folder):
    denoiser = load_denoiser(folder / "ddpm")
    unet = UNet2DModel.from_pretrained(folder / "ddpm" / "unet")
    x, t = pixels(2, 8), torch.tensor([3, 700])
    torch.testing.assert_close(denoiser.network(x, t, None), unet(x, t).sample)
    assert list(denoiser.parameters) == [name for name, _ in unet.named_parameters()]
    assert not denoiser.conditional and denoiser.sample_shape == denoiser.image_size == (3, 8, 8)
    assert torch.equal(denoiser.encode_images(x), x)
    with pytest.raises(ModelError, match="reads no captions"):
        denoiser.encode_captions(["a"])


@torch.no_grad()
def test_latents_are_the_mode_of_the_vae_times_its_factor(folder):
    denoiser = load_denoiser(folder / "sd")
    vae = AutoencoderKL.from_pretrained(folder / "sd" / "vae")
    x = pixels(2, 16)
    wanted = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(denoiser.encode_images(x), wanted)
    assert denoiser.sample_shape == (4, 8, 8) and denoiser.image_size == (3, 16, 16) and denoiser.conditional


@torch.no_grad()
def test_captions_are_encoded_as_the_pipeline_encodes_them(folder):
    denoiser = load_denoiser(folder / "sd")
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    captions = ["a red fox", "", "a red fox jumps over every single lazy dog there is"]
    wanted = torch.cat([pipe.encode_prompt(c, "cpu", 1, False)[0] for c in captions])
    found = denoiser.encode_captions(captions)
    torch.testing.assert_close(found, wanted)
    assert found.shape == (3, 16, 16) and not torch.equal(found[0], found[1])


@torch.no_grad()
@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_lora_network_equals_the_pipeline_with_the_lora(folder, tmp_path, text_encoder):
    file = tiny_lora(folder / "sd", tmp_path, seed=3, text_encoder=text_encoder)
    denoiser = load_denoiser(folder / "sd", lora=file)
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    pipe.load_lora_weights(file)
    x, t = pixels(2, 8, 4), torch.tensor([3, 700])
    cond = denoiser.encode_captions(["a", "b"])
    torch.testing.assert_close(cond, torch.cat([pipe.encode_prompt(c, "cpu", 1, False)[0] for c in "ab"]))
    wanted = pipe.unet(x, t, encoder_hidden_states=cond).sample
    torch.testing.assert_close(denoiser.network(x, t, cond), wanted, rtol=1e-4, atol=1e-5)
    plain = load_denoiser(folder / "sd").network(x, t, cond)
    assert (wanted - plain).abs().max() > 1e-3
    assert denoiser.parameters and all("lora_" in name for name in denoiser.parameters)
    assert any("text encoder" in note for note in denoiser.notes) == text_encoder


def test_an_untrained_lora_is_pointed_out(folder, tmp_path):
    denoiser = load_denoiser(folder / "sd", lora=tiny_lora(folder / "sd", tmp_path, zero=True).parent)
    assert any("lora_B is zero" in note for note in denoiser.notes)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_prediction_and_weighting_come_from_the_scheduler(tmp_path, prediction):
    denoiser = load_denoiser(tiny_ddpm(tmp_path / "m", prediction_type=prediction))
    assert denoiser.schedule.prediction == prediction
    assert denoiser.schedule.weighting == ("snr" if prediction == "sample" else "uniform")
    assert any("weighted by the signal-to-noise" in n for n in denoiser.notes) == (prediction == "sample")
    wanted = DDPMScheduler().alphas_cumprod.double().tolist()
    assert list(denoiser.schedule.alphas_cumprod) == wanted


def identity(path, **options):
    return load_denoiser(path, **options).identity


def changed(a, b):
    return {name for name in a if a[name] != b[name]}


@pytest.mark.parametrize(("part", "fields"), [
    ("unet", {"attention_head_dim": 2}),
    ("unet", {"flip_sin_to_cos": False}),
    ("vae", {"norm_num_groups": 2}),
    ("text_encoder", {"num_attention_heads": 4}),
    ("text_encoder", {"hidden_act": "gelu"}),
])  # fmt: skip
def test_the_same_weights_by_another_config_are_another_model(folder, tmp_path, part, fields):
    shutil.copytree(folder / "sd", tmp_path / "sd")
    file = tmp_path / "sd" / part / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    aside = {"sample_size": 64} if part == "unet" else {}
    silent = {"_name_or_path": "x", "_diffusers_version": "0.1", "transformers_version": "4.0"} | aside
    file.write_text(json.dumps(config | silent), encoding="utf-8")
    resolution = 16
    before = identity(folder / "sd", resolution=resolution)
    assert changed(before, identity(tmp_path / "sd", resolution=resolution)) == set()
    file.write_text(json.dumps(config | fields), encoding="utf-8")
    assert changed(before, identity(tmp_path / "sd", resolution=resolution)) == {"config"}


@pytest.mark.parametrize("damage", ["part", "renamed", "cut", "empty"])
def test_a_text_encoder_without_its_weights_is_refused_and_not_filled_at_random(folder, tmp_path, damage):
    shutil.copytree(folder / "sd", tmp_path / "sd")
    file = tmp_path / "sd" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    if damage == "part":
        save_file({n: t for n, t in tensors.items() if ".mlp." not in n}, file, metadata={"format": "pt"})
    elif damage == "renamed":
        save_file({f"foo.{n}": t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[: 1000 if damage == "cut" else 0])
    match = "has no weights for" if damage in ("part", "renamed") else "text_encoder cannot be loaded"
    with pytest.raises(ModelError, match=match) as caught:
        load_denoiser(tmp_path / "sd")
    assert str(caught.value).isprintable()


def test_a_config_that_no_network_can_have_is_refused_in_one_line(folder, tmp_path):
    for number, (part, fields) in enumerate((("unet", {"norm_num_groups": 0}), ("text_encoder", {"hidden_size": "x"}))):
        copy = shutil.copytree(folder / "sd", tmp_path / str(number))
        file = copy / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")
        with pytest.raises(ModelError, match=f"{part} cannot be loaded") as caught:
            load_denoiser(copy)
        assert str(caught.value).isprintable()


def test_one_changed_weight_changes_the_identity_of_the_model_alone(folder, tmp_path):
    shutil.copytree(folder / "sd", tmp_path / "sd")
    before = identity(tmp_path / "sd")
    assert changed(before, identity(folder / "sd")) == set()
    for part, field in (("unet", "model"), ("vae", "encoders"), ("text_encoder", "encoders")):
        shutil.rmtree(tmp_path / "sd")
        shutil.copytree(folder / "sd", tmp_path / "sd")
        (file,) = (tmp_path / "sd" / part).glob("*.safetensors")
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 1e-6
        save_file(tensors, file, metadata={"format": "pt"})
        assert changed(before, identity(tmp_path / "sd")) == {field}


def test_another_lora_changes_the_identity_of_the_lora_alone(folder, tmp_path):
    base = identity(folder / "sd", lora=folder / "lora")
    assert changed(base, identity(folder / "sd", lora=tiny_lora(folder / "sd", tmp_path, seed=9))) == {"lora"}
    assert changed(base, identity(folder / "sd")) == {"lora", "parameters"}


def test_sharded_weights_are_the_same_model(folder, tmp_path):
    shutil.copytree(folder / "ddpm", tmp_path / "m")
    unet = UNet2DModel.from_pretrained(tmp_path / "m" / "unet")
    shutil.rmtree(tmp_path / "m" / "unet")
    unet.save_pretrained(tmp_path / "m" / "unet", max_shard_size="20KB")
    assert len(list((tmp_path / "m" / "unet").glob("*.safetensors"))) > 1
    assert changed(identity(folder / "ddpm"), identity(tmp_path / "m")) == set()


def test_globs_select_parameters_and_are_part_of_the_identity(folder):
    chosen = load_denoiser(folder / "ddpm", parameters="conv_in.*, *.to_q.weight")
    assert set(chosen.parameters) >= {"conv_in.weight", "conv_in.bias"} and len(chosen.parameters) < 10
    assert changed(chosen.identity, identity(folder / "ddpm")) == {"parameters"}
    with pytest.raises(ModelError, match=r"'nothing\*' matches none of \d+ parameters; one is conv_in.weight"):
        load_denoiser(folder / "ddpm", parameters="nothing*")


def training_output(folder, path, *, ema=True, root=()):
    """What accelerate leaves: checkpoints with the UNet alone."""
    unet = UNet2DModel.from_pretrained(folder / "ddpm" / "unet")
    for step in (100, 20):
        for name in ("unet", "unet_ema") if ema else ("unet",):
            unet.conv_in.bias.data[0] = step + (name == "unet_ema") / 2
            unet.save_pretrained(path / f"checkpoint-{step}" / name)
    for part in root:
        shutil.copytree(folder / "ddpm" / part, path / part)
    return path


@pytest.mark.parametrize(("ema", "value"), [(True, 100.5), (False, 100.0)])
def test_the_newest_checkpoint_is_taken_and_its_average_preferred(folder, tmp_path, ema, value):
    denoiser = load_denoiser(training_output(folder, tmp_path / "run", ema=ema, root=("scheduler",)))
    assert denoiser.parameters["conv_in.bias"][0] == value
    assert any("checkpoint-100/unet" in note for note in denoiser.notes)
    assert not any("no scheduler" in note for note in denoiser.notes)


def test_a_checkpoint_itself_can_be_named_and_a_missing_scheduler_is_an_assumption_said_aloud(folder, tmp_path):
    run = training_output(folder, tmp_path / "run")
    config = run / "checkpoint-20" / "unet_ema" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": None}))
    denoiser = load_denoiser(run / "checkpoint-20")
    assert denoiser.parameters["conv_in.bias"][0] == 20.5
    assert any("no scheduler in the folder: assumed DDPM" in note for note in denoiser.notes)


def test_a_conditional_checkpoint_finds_the_other_parts_through_its_origin_or_refuses(folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folder / "sd", subfolder="unet")
    unet.save_pretrained(tmp_path / "run" / "checkpoint-5" / "unet")
    config = tmp_path / "run" / "checkpoint-5" / "unet" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"_name_or_path": str(folder / "sd")}))
    assert load_denoiser(tmp_path / "run").conditional
    config.write_text(json.dumps(fields | {"_name_or_path": "somewhere/else"}))
    with pytest.raises(ModelError, match=r"scheduler_config.json is missing; copy the scheduler"):
        load_denoiser(tmp_path / "run")


def edited(folder, tmp_path, file, **fields):
    target = tmp_path / "edited"
    shutil.copytree(folder, target)
    record = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(record | fields))
    return target


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline; supported: DDPMPipeline"),
        ("unet/config.json", {"_class_name": "Evil"}, "is a Evil; supported: UNet2DModel"),
        ("unet/config.json", {"num_class_embeds": 3}, "has no weights for class_embedding|needs more than"),
        ("unet/config.json", {"sample_size": None}, "say the pixels of a side with --resolution"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction type 'flow' is not supported"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "scheduler FlowMatchEulerDiscreteScheduler is not supported",
        ),
    ],
)
def test_what_no_stage_supports_is_refused_by_name(folder, tmp_path, file, fields, message):
    with pytest.raises(ModelError, match=message):
        load_denoiser(edited(folder / "ddpm", tmp_path, file, **fields))


def test_folders_that_are_no_model_are_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="there is no model folder at"):
        load_denoiser(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"holds no model_index.json and no checkpoint"):
        load_denoiser(tmp_path)
    shutil.copytree(folder / "ddpm", tmp_path / "m")
    (file,) = (tmp_path / "m" / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match="pickled ones are not read"):
        load_denoiser(tmp_path / "m")
    file.write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_denoiser(tmp_path / "m")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_stop_at_once_and_are_named(folder, tmp_path, value):
    shutil.copytree(folder / "ddpm", tmp_path / "m")
    (file,) = (tmp_path / "m" / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_out.weight"].view(-1)[5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="tensor conv_out.weight holds NaN or infinity"):
        load_denoiser(tmp_path / "m")


def test_loras_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="there is no LoRA at"):
        load_denoiser(folder / "sd", lora=tmp_path)
    with pytest.raises(ModelError, match="this model is unconditional"):
        load_denoiser(folder / "ddpm", lora=folder / "lora")
    state = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    odd = {name.replace("attn1", "attn9"): tensor for name, tensor in state.items()}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match="odd.safetensors"):
        load_denoiser(folder / "sd", lora=tmp_path / "odd.safetensors")


@pytest.mark.parametrize("resolution", [24, 32])
def test_another_resolution_can_be_asked_for_if_the_network_takes_it(folder, resolution):
    assert load_denoiser(folder / "sd", resolution=resolution).sample_shape == (4, resolution // 2, resolution // 2)
    with pytest.raises(ModelError, match="resolution is 13; this model takes multiples of 4"):
        load_denoiser(folder / "sd", resolution=13)


def test_a_saved_denoiser_is_the_same_model(folder, tmp_path):
    denoiser = load_denoiser(folder / "sd")
    save_denoiser(denoiser, tmp_path / "copy", base=folder / "sd")
    assert changed(denoiser.identity, identity(tmp_path / "copy")) == set()
    with pytest.raises(ModelError, match="exists already"):
        save_denoiser(denoiser, tmp_path / "copy", base=folder / "sd")


def test_averaged_weights_are_the_network_of_the_plain_ones_whatever_their_config_says_of_the_average(folder, tmp_path):
    unet = UNet2DModel.from_pretrained(folder / "ddpm" / "unet")
    average = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
    average.save_pretrained(tmp_path / "checkpoint-3" / "unet_ema")
    shutil.copytree(folder / "ddpm" / "scheduler", tmp_path / "scheduler")
    assert "optimization_step" in (tmp_path / "checkpoint-3" / "unet_ema" / "config.json").read_text(encoding="utf-8")
    assert changed(identity(folder / "ddpm"), identity(tmp_path)) == set()


def test_weights_of_half_precision_in_several_files_are_read(folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "sd").to(torch.float16)
    pipeline.save_pretrained(tmp_path / "sd", variant="fp16", max_shard_size="8KB")
    assert len([*(tmp_path / "sd" / "unet").glob("*.fp16-*.safetensors")]) > 1
    found, expected = load_denoiser(tmp_path / "sd"), load_denoiser(folder / "sd")
    for name, p in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], p.half().float())


def test_what_is_saved_beside_a_base_with_averaged_weights_is_what_was_trained(folder, tmp_path):
    shutil.copytree(folder / "ddpm" / "scheduler", tmp_path / "out" / "scheduler")
    for name in ("unet", "unet_ema"):
        shutil.copytree(folder / "ddpm" / "unet", tmp_path / "out" / "checkpoint-9" / name)
    base = tmp_path / "out" / "checkpoint-9"
    (tmp_path / "out" / "logs").mkdir()
    denoiser = load_denoiser(base)
    next(iter(denoiser.parameters.values())).data.add_(1)
    for number, named in enumerate((base, tmp_path / "out")):
        copy = tmp_path / "out" / f"copy{number}"  # inside what it is made of
        save_denoiser(denoiser, copy, base=named)
        found = load_denoiser(copy)
        assert {path.name for path in copy.iterdir()} == {"unet", "scheduler"} and found.schedule == denoiser.schedule
        assert all(torch.equal(p, found.parameters[name]) for name, p in denoiser.parameters.items())


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_a_disk_that_is_full_leaves_no_part_of_a_model(folder, tmp_path, monkeypatch, kind):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    if kind == "weights":
        denoiser = load_denoiser(folder / "ddpm")
        monkeypatch.setattr(UNet2DModel, "save_pretrained", full)
        with pytest.raises(ModelError, match="out cannot be written: .*No space left"):
            save_denoiser(denoiser, tmp_path / "out", base=folder / "ddpm")
    else:
        denoiser = load_denoiser(folder / "sd")
        add_fresh_lora(denoiser, rank=2, alpha=2.0, targets="to_q", seed=0)
        monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", full)
        with pytest.raises(ModelError, match="safetensors cannot be written: .*No space left"):
            adapters.save(denoiser.network.unet, tmp_path)
    assert not [*tmp_path.iterdir()]


@torch.no_grad()
def predicted(denoiser):
    x, t = pixels(2, 8, 4), torch.tensor([3, 700])
    return denoiser.network(x, t, torch.from_numpy(keys.normal(("condition",), (2, 16, 16))))


@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, 2.0, 8.0])
def test_a_saved_lora_has_its_alpha(folder, tmp_path, alpha):
    trained = load_denoiser(folder / "sd")
    add_fresh_lora(trained, rank=2, alpha=alpha, targets="to_q,to_k", seed=0)
    for name, parameter in trained.parameters.items():
        parameter.copy_(torch.from_numpy(keys.normal(("trained", name), tuple(parameter.shape))) / 4)
    file = adapters.save(trained.network.unet, tmp_path)
    found = load_denoiser(folder / "sd", lora=file)
    assert torch.equal(predicted(found), predicted(trained))
    assert not torch.allclose(predicted(found), predicted(load_denoiser(folder / "sd")), atol=1e-3)
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    pipe.load_lora_weights(file)  # as others read it
    scalings = {scale for module in pipe.unet.modules() for scale in getattr(module, "scaling", {}).values()}
    assert scalings == {alpha / 2}
    assert str(tmp_path) not in file.read_bytes().decode("latin1")


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"alpha_pattern": {"attn1.to_q": 20}}, {"rank_pattern": {"attn2.to_v": 3}}, {"use_rslora": True}]
)
def test_a_saved_lora_has_what_its_outputs_depend_on(folder, tmp_path, options):
    trained = load_denoiser(folder / "sd")
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False, **options)
    trained.network.unet.add_adapter(config, adapter_name="default_0")
    found = load_denoiser(folder / "sd", lora=adapters.save(trained.network.unet, tmp_path))
    assert torch.equal(predicted(found), predicted(trained))


def kohya_lora(source, file, alpha):
    """A LoRA of diffusers under kohya's names, which have α beside each layer."""
    state = {}
    for name, tensor in load_file(source).items():
        layer, part = name.removeprefix("unet.").rsplit(".lora_", 1)
        layer = "lora_unet_" + layer.replace(".", "_")
        state[f"{layer}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        state[f"{layer}.alpha"] = torch.tensor(float(alpha))
    save_file(state, file)
    return file


@torch.no_grad()
def test_loras_of_other_trainers_have_the_alpha_of_their_keys_or_r(folder, tmp_path):
    plain = folder / "lora" / "pytorch_lora_weights.safetensors"  # r = 2, and nothing says α
    state = {n: 4 * tensor if "lora_B" in n else tensor for n, tensor in load_file(plain).items()}
    save_file(state, tmp_path / "four.safetensors")
    wanted = predicted(load_denoiser(folder / "sd", lora=tmp_path / "four.safetensors"))
    for alpha, expected in ((2, predicted(load_denoiser(folder / "sd", lora=plain))), (8, wanted)):
        file = kohya_lora(plain, tmp_path / f"kohya{alpha}.safetensors", alpha)
        torch.testing.assert_close(predicted(load_denoiser(folder / "sd", lora=file)), expected)


def test_a_dora_is_refused_since_its_base_cannot_be_had_from_it(folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folder / "sd", subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], use_dora=True))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    with pytest.raises(ModelError, match=r"is a DoRA \(unet\..*lora_magnitude_vector.*\); not supported: pass a LoRA"):
        load_denoiser(folder / "sd", lora=tmp_path)
    file = kohya_lora(folder / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors", 2)
    state = load_file(file)
    state |= {name.replace("alpha", "dora_scale"): torch.ones(16, 1) for name in state if name.endswith("alpha")}
    save_file(state, file)
    with pytest.raises(ModelError, match=r"is a DoRA \(lora_unet_.*dora_scale\)"):
        load_denoiser(folder / "sd", lora=file)


@pytest.mark.parametrize("extra", ["unet.conv_in.weight", "alpha", "unet.foo.bar"])
def test_a_file_with_more_than_a_lora_is_refused(folder, tmp_path, extra):
    tensors = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    if extra == "alpha":  # diffusers passes these over: the adapter would be scaled by 1
        alphas = {n.replace("lora_A.weight", "alpha"): torch.tensor(2.0) for n in tensors if "lora_A" in n}
        save_file(tensors | alphas, tmp_path / "r.safetensors", metadata={"format": "pt"})
        plain = tmp_path / "plain.safetensors"
        save_file(tensors, plain, metadata={"format": "pt"})
        of_rank = identity(folder / "sd", lora=tmp_path / "r.safetensors")
        assert changed(identity(folder / "sd", lora=plain), of_rank) == set(), "α = r is what diffusers takes"
        tensors |= {name: torch.tensor(1.0) for name in alphas}
    else:
        tensors |= {extra: torch.ones(8, 4, 3, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is 1 and its rank 2; diffusers" if extra == "alpha" else "is no tensor of a"):
        load_denoiser(folder / "sd", lora=tmp_path / "x.safetensors")


def test_a_lora_file_that_is_none_is_refused(folder, tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="junk.safetensors cannot be read"):
        load_denoiser(folder / "sd", lora=tmp_path / "junk.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"_class_name": "EDMEulerScheduler"},
            "scheduler EDMEulerScheduler is not supported; expected one of the DDPM",
        ),
        ({"_class_name": "ScoreSdeVeScheduler"}, "scheduler ScoreSdeVeScheduler is not supported"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "scheduler CMStochasticIterativeScheduler is not"),
        ({"_class_name": "UNet2DModel"}, "scheduler UNet2DModel is not supported"),
        ({"_class_name": "utils"}, "scheduler utils is not supported"),
        ({"_class_name": None}, "scheduler None is not supported"),
        ({"prediction_type": ["epsilon"]}, r"prediction type \['epsilon'\] is not supported"),
        ({"beta_schedule": "exponential"}, "scheduler_config.json: exponential is not implemented.*; expected betas"),
        ({"beta_start": "x"}, "scheduler_config.json: .*; expected betas"),
        ({"trained_betas": [], "rescale_betas_zero_snr": True}, "scheduler_config.json: .*; expected betas"),
        ({"trained_betas": []}, "scheduler_config.json: the noise schedule has no timesteps"),
        ({"num_train_timesteps": "x"}, "num_train_timesteps is 'x'; expected a whole number, at least 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; expected a whole number, at least 1"),
        ({"num_train_timesteps": 2.5}, "num_train_timesteps is 2.5; expected a whole number, at least 1"),
    ],
)
def test_a_noise_schedule_that_is_not_of_the_ddpm_family_is_refused_in_one_line(folder, tmp_path, fields, message):
    with pytest.raises(ModelError, match=message) as refused:
        load_denoiser(edited(folder / "ddpm", tmp_path, "scheduler/scheduler_config.json", **fields))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "DPMSolverSDEScheduler",
    ],  # the last a stand-in, where torchsde is not installed
)
def test_samplers_of_the_ddpm_family_say_the_schedule_of_the_training(folder, tmp_path, name):
    found = load_denoiser(edited(folder / "sd", tmp_path, "scheduler/scheduler_config.json", _class_name=name))
    assert found.schedule == load_denoiser(folder / "sd").schedule


def with_tokenizer(folder, tmp_path, *, vocabulary=None, config=None, without=()):
    """The tiny pipeline with a tokenizer in the older format: vocab.json and merges.txt."""
    sd = tmp_path / "broken"
    shutil.copytree(folder / "sd", sd)
    shutil.rmtree(sd / "tokenizer")
    tiny_tokenizer(sd / "tokenizer")
    record = json.loads((folder / "sd" / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    (sd / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(record | (config or {})), encoding="utf-8")
    if vocabulary is not None:
        (sd / "tokenizer" / "vocab.json").write_text(vocabulary, encoding="utf-8")
    for name in without:
        (sd / "tokenizer" / name).unlink()
    return sd


def test_a_tokenizer_may_be_in_the_older_format(folder, tmp_path):
    found, plain = load_denoiser(with_tokenizer(folder, tmp_path)), load_denoiser(folder / "sd")
    assert changed(found.identity, plain.identity) == set()


FEW = {"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
MANY = {f"w{i}": i for i in range(600)} | {"<|startoftext|>": 600, "<|endoftext|>": 601}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"without": ["vocab.json", "merges.txt"]},
            "holds no tokenizer.json, nor vocab.json with merges.txt; copy the",
        ),
        ({"without": ["merges.txt"]}, "holds no tokenizer.json, nor vocab.json with merges.txt; copy the tokenizer"),
        (
            {"without": ["tokenizer_config.json"]},
            r"model_max_length is 10+\d*; expected 1 … 16, .*; copy the tokenizer",
        ),
        ({"config": {"model_max_length": 77}}, "model_max_length is 77; expected 1 … 16, what the text encoder reads"),
        ({"config": {"model_max_length": "16"}}, "model_max_length is '16'; expected 1 … 16"),
        ({"vocabulary": "{"}, r"tokenizer cannot be loaded: .*; copy the tokenizer folder of the base model"),
        ({"vocabulary": json.dumps(FEW)}, "has 3 tokens, and the text encoder vectors for 514; copy the tokenizer"),
        ({"vocabulary": json.dumps(MANY)}, "has 602 tokens, and the text encoder vectors for 514; copy the tokenizer"),
    ],
)
def test_a_tokenizer_that_would_not_tell_captions_apart_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(ModelError, match=message) as refused:
        load_denoiser(with_tokenizer(folder, tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_vectors_that_no_token_has_are_padding(folder, tmp_path):
    sd = tmp_path / "padded"
    shutil.copytree(folder / "sd", sd)
    (file,) = (sd / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    (name,) = (name for name in tensors if "token_embedding" in name)
    tensors[name] = torch.cat([tensors[name], torch.zeros(62, 16)])
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((sd / "text_encoder" / "config.json").read_text())
    (sd / "text_encoder" / "config.json").write_text(json.dumps(config | {"vocab_size": 576}))
    assert torch.equal(load_denoiser(sd).encode_captions(["a"]), load_denoiser(folder / "sd").encode_captions(["a"]))


def test_a_network_that_predicts_a_variance_too_is_refused(tmp_path):
    tiny_ddpm(tmp_path / "m")
    unet = UNet2DModel.from_config(UNet2DModel.load_config(tmp_path / "m" / "unet"), out_channels=6)
    fill(unet, 0).save_pretrained(tmp_path / "m" / "unet")
    with pytest.raises(ModelError, match="unet reads 3 channels and predicts 6; expected as many: .* pass a model"):
        load_denoiser(tmp_path / "m")


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"in_channels": 9}, "unet reads 9 channels and predicts 4; expected as many: .* inpaint.* pass a model"),
        (
            {"in_channels": 8, "out_channels": 8},
            "unet reads 8 channels and the VAE makes 4; expected as many; copy the",
        ),
    ],
)
def test_a_network_that_does_not_read_the_latents_of_the_vae_is_refused(folder, tmp_path, channels, message):
    shutil.copytree(folder / "sd", tmp_path / "m")
    config = UNet2DConditionModel.load_config(tmp_path / "m" / "unet")
    fill(UNet2DConditionModel.from_config(config, **channels), 0).save_pretrained(tmp_path / "m" / "unet")
    with pytest.raises(ModelError, match=message):
        load_denoiser(tmp_path / "m")


def test_a_lora_whose_layers_have_several_alphas_is_refused_since_diffusers_takes_one(folder, tmp_path):
    file = kohya_lora(folder / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "several.safetensors", 2)
    state = load_file(file)
    odd = sorted(name for name in state if name.endswith("alpha"))[3]
    save_file(state | {odd: torch.tensor(7.0)}, file)
    with pytest.raises(ModelError, match=r"has 1 layers of α = 7, say, that diffusers scales by another"):
        load_denoiser(folder / "sd", lora=file)


def test_a_lora_whose_ranks_are_scaled_by_one_alpha_and_should_not_be_is_refused(folder, tmp_path):
    file = kohya_lora(folder / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "ranks.safetensors", 1)
    state = load_file(file)
    layer = sorted(name for name in state if name.endswith("alpha"))[2].removesuffix(".alpha")
    down, up = (state[f"{layer}.lora_{part}.weight"] for part in ("down", "up"))
    state[f"{layer}.lora_down.weight"] = torch.ones(49, down.shape[1])  # scaled back, α / 49 · 49 is not quite α
    state[f"{layer}.lora_up.weight"] = torch.ones(up.shape[0], 49)
    save_file(state | {f"{layer}.alpha": torch.tensor(49.0)}, file)
    with pytest.raises(ModelError, match=r"has 1 layers of α = 49, say, that diffusers scales by another"):
        load_denoiser(folder / "sd", lora=file)
