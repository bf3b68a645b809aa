"""Knowledge synergy as a method: the loss over all heads, what is kept, what evaluation sees."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eval as evaluation
import train_split
from method import Progress, Targets, methods
from method.dks import DKSOptions
from model import BackboneRequest, build_network, build_splitnet
from model.splitnet import SplitNet
from parser_params import parse_config, resolve_config
from record.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

PROGRESS = Progress(0, 0, 0, 10, 2, 0.1, torch.arange(6))
REQUEST = BackboneRequest(arch="wrn_16_1", num_classes=10, dataset="digits", crop_size=16)


def make(num_networks: int = 1, arch: str = "wrn_16_1", **options):
    torch.manual_seed(0)
    network = build_splitnet(REQUEST, seed=0, archs=[arch] * num_networks)
    return methods.get("dks")(network, DKSOptions(**options))


def batch(num_views: int = 1) -> tuple[Tensor, Targets]:
    torch.manual_seed(1)
    labels = torch.randint(10, (6,))
    return torch.randn(num_views, 6, 3, 16, 16), Targets(labels, labels, torch.tensor(1.0))


def test_loss_is_that_of_the_golden_file_for_the_heads_logits():
    row = json.loads((Path(__file__).parent / "golden" / "dks.json").read_text())["loss"][0]
    logits = torch.tensor(row["logits"], dtype=torch.float64)
    method = make().double()
    method._heads = lambda i, images: dict(zip(("branch1", "branch2", "main"), logits, strict=True))
    labels = torch.tensor(row["targets"])
    output = method(torch.zeros(1, 3, 3, 4, 4), Targets(labels, labels, torch.tensor(1.0)), PROGRESS)
    assert output.loss.item() == pytest.approx(row["exact"]["total"], rel=1e-8)
    assert output.metrics["loss_ce"].item() == pytest.approx(row["ce_sum"], rel=1e-8)
    assert output.metrics["loss_synergy"].item() == pytest.approx(row["exact"]["kl_sum"], rel=1e-8)
    assert torch.equal(output.logits_SBK, logits[-1:])


def test_heads_are_in_order_and_all_learn():
    method = make()
    views, targets = batch()
    output = method(views, targets, PROGRESS)
    assert list(output.metrics)[:2] == ["loss_ce", "loss_synergy"]
    assert list(output.metrics)[2:] == ["loss_ce_branch1", "loss_ce_branch2", "loss_ce_main"]
    torch.testing.assert_close(sum(list(output.metrics.values())[2:]), output.metrics["loss_ce"])
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("branches", [(), (1,), (2,), (1, 2)])
def test_any_number_of_heads(branches):
    method = make(dks_branches=branches)
    views, targets = batch()
    output = method(views, targets, PROGRESS)
    assert len(output.metrics) == 2 + len(branches) + 1
    if not branches:
        logits = method.network.models[0](views[0])
        torch.testing.assert_close(output.loss, F.cross_entropy(logits, targets.labels_B))


def test_without_matching_it_is_deep_supervision():
    views, targets = batch()
    output = make(dks_matching="none")(views, targets, PROGRESS)
    assert output.metrics["loss_synergy"] == 0
    torch.testing.assert_close(output.loss.detach(), output.metrics["loss_ce"])
    directions = [
        make(dks_matching=m)(views, targets, PROGRESS).metrics["loss_synergy"] for m in ("top_down", "bottom_up")
    ]
    torch.testing.assert_close(sum(directions), make()(views, targets, PROGRESS).metrics["loss_synergy"])


def test_mixup_mixes_every_classification_loss():
    method = make(dks_matching="none")
    views, targets = batch()
    others = (targets.labels_B + 1) % 10
    mixed = method(views, Targets(targets.labels_B, others, torch.tensor(0.25)), PROGRESS).loss
    parts = [method(views, Targets(one, one, torch.tensor(1.0)), PROGRESS).loss for one in (targets.labels_B, others)]
    torch.testing.assert_close(mixed, 0.25 * parts[0] + 0.75 * parts[1])


def test_several_networks_learn_side_by_side():
    method = make(2)
    views, targets = batch(2)
    output = method(views, targets, PROGRESS)
    assert output.logits_SBK.shape == (2, 6, 10)
    for i in range(2):
        torch.testing.assert_close(output.logits_SBK[i], method.network.models[i](views[i]))
    alone = []
    for i in range(2):
        single = methods.get("dks")(SplitNet([method.network.models[i]]), DKSOptions())
        single.branches[0].load_state_dict(method.branches[i].state_dict())
        alone.append(single(views[i : i + 1], targets, PROGRESS).loss)
    torch.testing.assert_close(output.loss, sum(alone))


def test_the_kept_network_is_the_plain_backbone():
    """What a checkpoint keeps of the networks loads into the plain backbone; branches are the method's own state."""
    method = make().eval()
    plain = build_network(REQUEST).eval()
    plain.load_state_dict(method.network.models[0].state_dict(), strict=True)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(plain(images), method.network(images)[0])
        assert torch.equal(plain(images), method._heads(0, images)["main"])
    state = method.training_state()
    own = {name for name, _ in method.named_parameters()} - {
        f"network.{n}" for n, _ in method.network.named_parameters()
    }
    assert own == {name for name in state if "running" not in name and "num_batches" not in name}
    assert all(name.startswith("branches.") for name in state)


def test_the_deployed_network_is_the_plain_backbone_through_eval(tmp_path, capsys, logging_restored):
    """A checkpoint without what DKS keeps beside the networks evaluates, and its logits are the plain backbone's."""
    argv = ["--method", "dks", "--arch", "wrn_16_1", "--dataset", "digits", "--batch_size", "96", "--seed", "1"]
    argv += ["--max_steps", "2", "--amp_dtype", "fp32", "--no_cuda", "--model_dir", str(tmp_path / "run")]
    assert train_split.main(argv) == 0
    content = load_checkpoint(tmp_path / "run" / "checkpoint_0_2.pth.tar")
    plain = build_network(REQUEST).eval()
    state = {key.removeprefix("module.models.0."): value for key, value in content["state_dict"].items()}
    plain.load_state_dict(state, strict=True)
    assert any(name.startswith("branches.") for name in content["method"])
    exported = {key: value for key, value in content.items() if key not in ("method", "optimizer")}
    save_checkpoint(exported, tmp_path / "exported.pth.tar")
    images = torch.randn(5, 3, 16, 16)
    np.save(tmp_path / "images.npy", images.numpy())
    argv = ["--resume", str(tmp_path / "exported.pth.tar"), "--predict", str(tmp_path / "images.npy"), "--no_cuda"]
    assert evaluation.main([*argv, "--amp_dtype", "fp32", "--workers", "0", "--model_dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    logits = torch.from_numpy(np.load(tmp_path / "out" / "predict_images.npy" / "logits.npz")["logits"])
    with torch.no_grad():
        torch.testing.assert_close(logits[0], plain(images), rtol=1e-5, atol=1e-5)


def test_extra_rows_are_the_branches():
    images = torch.randn(2, 3, 16, 16)
    method = make(2).eval()
    rows = method.extra_logits(images)
    assert list(rows) == ["1_branch1", "1_branch2", "2_branch1", "2_branch2"]
    assert all(row.shape == (2, 10) for row in rows.values())
    assert list(make().extra_logits(images)) == ["branch1", "branch2"]


def test_training_state_round_trip():
    source, target = make(), make()
    for parameter in target.branches.parameters():
        nn.init.zeros_(parameter)
    target.load_training_state(source.training_state())
    for ours, theirs in zip(source.branches.state_dict().values(), target.branches.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_backbones_that_cannot_are_refused():
    with pytest.raises(UserError, match="one block per group"):
        make(arch="wrn_10_1")
    with pytest.raises(UserError, match="has no stages that run one after another"):
        methods.get("dks")(SplitNet([nn.Linear(3, 2)]), DKSOptions())
    with pytest.raises(UserError, match="--dks_branches 3"):
        make(dks_branches=(3,))


def test_the_optimiser_starts_anew_at_every_drop_of_the_rate(tmp_path, capsys, logging_restored):
    """As if the momentum in the checkpoint at the milestone were zero; also where the run is stopped in between."""
    argv = ["--method", "dks", "--arch", "wrn_16_1", "--dataset", "digits", "--batch_size", "96", "--seed", "1"]
    argv += ["--epochs", "4", "--lr_mode", "step", "--lr_milestones", "1", "3", "--momentum", "0.9", "--no_cuda"]
    argv += ["--amp_dtype", "fp32", "--iters_to_accumulate", "2", "--eval_per_epoch", "9"]
    argv += ["--val_fraction", "0.7", "--dks_branches", "1", "--max_ckpt_nums", "9"]
    steps_per_epoch = 4

    def run(name, steps, *more):
        flags = [*argv, "--model_dir", str(tmp_path / name), "--max_steps", str(steps), *more]
        assert train_split.main(flags) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out.splitlines()[-1])["state_sha256"]

    fresh = ("--dks_fresh_optimizer", "1")
    whole = run("whole", 2 * steps_per_epoch + 2, *fresh)
    assert whole != run("kept", 2 * steps_per_epoch + 2)
    # stopped at the milestone, behind it, and within the epochs
    for steps in (2, steps_per_epoch, steps_per_epoch + 2, 2 * steps_per_epoch):
        run("parts", steps, *fresh, "--resume", "auto")
    assert run("parts", 2 * steps_per_epoch + 2, *fresh, "--resume", "auto") == whole

    run("emptied", steps_per_epoch)
    path = tmp_path / "emptied" / "checkpoint_1.pth.tar"
    content = load_checkpoint(path)
    for state in content["optimizer"]["state"].values():
        assert state["momentum_buffer"].any()
        state["momentum_buffer"].zero_()
    save_checkpoint(content, path)
    assert run("emptied", 2 * steps_per_epoch + 2, "--resume", "auto") == whole


def test_published_recipe():
    fresh = DKSOptions(dks_fresh_optimizer=True)
    network = build_splitnet(REQUEST, seed=0)
    assert tuple(methods.get("dks")(network, fresh).fresh_optimizer_at((59, 119, 159))) == (59, 119, 159)
    assert tuple(methods.get("dks")(network, DKSOptions()).fresh_optimizer_at((59, 119, 159))) == ()
    config = resolve_config(
        parse_config(["--method", "dks", "--dataset", "cifar100", "--arch", "wrn_28_10"]), data_recipe="cifar100"
    )
    assert (config.method_options.dks_fresh_optimizer, config.lr_milestones) == (True, (59, 119, 159))
    recipe = methods.get("dks").recipe("cifar100", None)
    assert (recipe["epochs"], recipe["lr_milestones"], recipe["lr_step_multiplier"]) == (200, (59, 119, 159), 0.2)
    assert (recipe["weight_decay"], recipe["is_wd_all"], recipe["is_nesterov"]) == (5e-4, True, False)
    assert methods.get("dks").recipe("cifar10", 20)["lr_milestones"] == (6, 12, 16)
    assert methods.get("dks").recipe("cifar10", 1)["lr_milestones"] == (1, 1)  # none at the start
    assert (recipe["padding_mode"], recipe["mean"][0], recipe["std"][2]) == ("reflect", 125.3 / 255, 66.7 / 255)
    assert set(methods.get("dks").recipe("digits", None)) <= {
        "is_mixup", "is_autoaugment", "is_cutout", "is_label_smoothing"
    }  # fmt: skip
