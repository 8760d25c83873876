import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_ddpm, tiny_lora, tiny_stable_diffusion

from influence import keys
from influence.errors import ModelError
from influence.models import load_denoiser, save_denoiser


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
    wanted = DDPMScheduler().alphas_cumprod.double().tolist()
    assert list(denoiser.schedule.alphas_cumprod) == wanted


def identity(path, **options):
    return load_denoiser(path, **options).identity


def changed(a, b):
    return {name for name in a if a[name] != b[name]}


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
