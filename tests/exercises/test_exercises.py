"""What a right answer does and a wrong one does not: properties, and values worked out by hand.

ANSWERS=mine.py python -m pytest tests/exercises        # your answers; without ANSWERS, the five scripts'
"""
import functools
import importlib.util
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

HERE = Path(__file__).resolve().parent

def load(path):
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def answer(module, name):
    """A module's function; one that is not written yet skips the test that calls it."""
    assert hasattr(module, name), f"{module.__file__} has no function {name}; its head is in exercises.py"
    function = getattr(module, name)

    @functools.wraps(function)
    def call(*args):
        try:
            found = function(*args)
        except NotImplementedError as e:
            if str(e):                                          # torch's, of an operation that it lacks
                raise
            pytest.skip(f"not answered yet: {inspect.trace()[-1].function}")
        assert found is not None, f"{name} should return its result; got None, which is what no return gives"
        return found
    return call

ANSWERS = load(os.environ.get("ANSWERS", HERE / "solutions.py"))

def exercise(name):
    """A fixture: the answer to be tested."""
    @pytest.fixture
    def function():
        return answer(ANSWERS, name)
    return function

project = exercise("project")
align_loss = exercise("align_loss")
omega = exercise("omega")
flow_loss = exercise("flow_loss")
interleave = exercise("interleave")
flow_step = exercise("flow_step")
guidance = exercise("guidance")
frechet_distance = exercise("frechet_distance")

def expect(found, expected, lesson):
    """Same shape, same values but for rounding; or else the lesson, with both."""
    __tracebackhide__ = True
    found, expected = (torch.as_tensor(v).detach().double() for v in (found, expected))
    if found.shape != expected.shape:
        raise AssertionError(f"{lesson}; got shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    wrong = ~torch.isclose(found, expected, rtol=1e-5, atol=1e-6)
    if wrong.any():
        where = "" if wrong.numel() <= 16 else f", for instance at {wrong.nonzero()[0].tolist()}"
        got, instead = (some(v[wrong][0] if where else v) for v in (found, expected))
        raise AssertionError(f"{lesson}; got {got} instead of {instead}{where}")

def some(values):
    """A few numbers, to be read."""
    text = ", ".join(f"{value:.4g}" for value in values.flatten().tolist())
    return f"[{text}]" if values.ndim else text

def channels(*values):
    """A latent of one picture and one position."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)

def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

# ------------------------------------------------------------ project

def test_project_takes_the_mean_of_consecutive_channels(project):
    """C = 2, r = 3: channels 0, 1, 5 belong to base channel 0, channels 3, 6, 9 to base channel 1"""
    expect(project(channels(0, 1, 5, 3, 6, 9), 2), channels(2, 6),
           "Proj of [0, 1, 5, 3, 6, 9] on C = 2 is the mean of the first three and that of the last three")

def test_project_with_as_many_channels_is_the_identity(project):
    z_d = random(2, 4, 3, 5)
    expect(project(z_d, 4), z_d, "with D = C every group is one channel, so Proj should change nothing")

def test_project_keeps_the_scale(project):
    expect(project(torch.ones(1, 8, 2, 2), 2), torch.ones(1, 2, 2, 2),
           "the mean of equal channels is that channel: Proj of ones should be ones")

def test_project_leaves_pictures_and_positions_apart(project):
    place = 100 * torch.arange(24.0).view(2, 1, 3, 4)
    expect(project(place + channels(1, 3, 5, 7), 2), place + channels(2, 6),
           "Proj mixes channels alone: what it gives at a position of a picture should come from there")

# ------------------------------------------------------------ align_loss

def test_align_loss_by_hand(align_loss):
    """Proj gives 2 and 6; less z, 1 and 2; squared, 1 and 4; their mean, 2.5"""
    expect(align_loss(channels(1, 3, 5, 7), channels(1, 4)), 2.5,
           "for details [1, 3, 5, 7] and z = [1, 4], Eq. (3) is the mean of (2 - 1)^2 and (6 - 4)^2")

def test_align_loss_leaves_room_within_a_group(align_loss):
    z, room = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    z_d = torch.stack([z + room, z - room], dim=2).flatten(1, 2)
    expect(align_loss(z_d, z), 0.0, "only a group's mean is aligned: z + a beside z - a should cost 0")

def test_align_loss_sees_the_scale(align_loss):
    """Twice z is off by z: the mean of 1, 4, 9 is 14 / 3"""
    z = channels(1, 2, -3)
    expect(align_loss(2 * z, z), 14 / 3, "z_d = 2 z has z's pattern but not its values: it costs mean(z^2)")

def test_align_loss_does_not_grow_with_the_batch_or_the_grid(align_loss):
    one = align_loss(channels(1, 3, 5, 7), channels(1, 4))
    many = align_loss(channels(1, 3, 5, 7).expand(3, 4, 8, 8), channels(1, 4).expand(3, 2, 8, 8))
    expect(many, one, "the loss is a mean over elements: the same error in more places costs no more")

def test_align_loss_trains_z_d_alone(align_loss):
    """d/dz_d of the mean of two squares, each of the mean of two: error / 2 = [1, 1, 2, 2] / 2"""
    z_d, z = channels(1, 3, 5, 7).requires_grad_(), channels(1, 4).requires_grad_()
    loss = align_loss(z_d, z)
    assert torch.is_tensor(loss) and loss.requires_grad, (
        "the loss should be a tensor with a gradient to z_d; here none of it depends on anything that trains")
    by_z_d, by_z = torch.autograd.grad(loss, [z_d, z], allow_unused=True)
    assert by_z_d is not None, "z_d should get a gradient, as it is what trains; it got none"
    expect(by_z_d, channels(0.5, 0.5, 1, 1), "each channel of z_d should get its group's error / (r C / 2)")
    assert by_z is None or not by_z.any(), (
        f"z is a target: no gradient should reach it, lest it move towards z_d; it got {some(by_z)}")

# ------------------------------------------------------------ omega

def test_omega_starts_at_0(omega):
    expect(omega(0, 4), 0.0, "omega(0) should be 0: at the first step the detail loss has no say")

def test_omega_is_half_way_at_half_time(omega):
    expect(omega(50, 100), 0.5, "omega(n_warm / 2) should be 1/2: there the cosine is 0")

def test_omega_follows_a_cosine(omega):
    """cos(pi / 4) = sqrt(1/2), cos(3 pi / 4) = -sqrt(1/2)"""
    expect([omega(1, 4), omega(3, 4)], [0.1464466, 0.8535534],
           "a quarter and three quarters of the way, omega should be (1 -+ sqrt(1/2)) / 2: slow at both ends")

def test_omega_stays_1_after_the_warm_up(omega):
    expect([omega(n, 4) for n in (4, 5, 8, 1000)], [1.0] * 4,
           "from n = n_warm on omega should be 1 for good; a cosine left alone turns back at n_warm")

# ------------------------------------------------------------ flow_loss

def test_flow_loss_by_hand(flow_loss):
    """Squares 4 | 1, 4, 9; w = 1/2: (4 + 7) / (1 + 3/2) = 4.4"""
    u_hat, u = channels(2, 1, 0, 3), channels(0, 0, 2, 0)
    expect(flow_loss(u_hat, u, 1, 0.5), 4.4,
           "for squared errors 4 (base) and 1, 4, 9 (details), w = 1/2, Eq. (13) is (4 + 14/2) / (1 + 3/2)")

def test_flow_loss_without_details_is_the_base_models(flow_loss):
    u_hat, u = channels(2, 4, 100, 100, 100), torch.zeros(1, 5, 1, 1)
    expect(flow_loss(u_hat, u, 2, 0.0), 10.0,
           "at w = 0 the loss is the base model's, the mean of its squares 4 and 16, whatever the details do")

def test_flow_loss_at_full_weight_is_the_plain_mean(flow_loss):
    u_hat, u = channels(1, 2, 3, 4, 5, 6), torch.zeros(1, 6, 1, 1)
    expect(flow_loss(u_hat, u, 2, 1.0), 91 / 6,
           "at w = 1 every element counts alike: the mean of the squares 1, 4, 9, 16, 25, 36")

def test_flow_loss_keeps_its_scale_while_w_grows(flow_loss):
    u_hat, u = torch.full((2, 6, 4, 4), 3.0), torch.zeros(2, 6, 4, 4)
    losses = [float(flow_loss(u_hat, u, 2, w)) for w in (0.0, 0.25, 0.5, 1.0)]
    expect(losses, [9.0] * 4, "with the same error everywhere the loss should be its square for every w")

def test_flow_loss_trains_the_details_in_proportion_to_w(flow_loss):
    """2 w error / (|B| + w |R|) = 2 / 4 * 1 / (1 + 3 / 4)"""
    u_hat = channels(1, 1, 1, 1).requires_grad_()
    for w, base, detail in ((0.0, 2.0, 0.0), (0.25, 2 / 1.75, 0.5 / 1.75)):
        loss = flow_loss(u_hat, torch.zeros(1, 4, 1, 1), 1, w)
        assert torch.is_tensor(loss) and loss.requires_grad, "the loss should have a gradient to u_hat"
        [gradient] = torch.autograd.grad(loss, u_hat)
        expect(gradient, channels(base, detail, detail, detail),
               f"at w = {w} the gradient of a detail element should be w times that of a base element")

# ------------------------------------------------------------ interleave

def test_interleave_by_hand(interleave):
    """p = 2, C = 2, D = 1"""
    base, detail = torch.arange(8.0), torch.tensor([10.0, 11, 12, 13])
    expect(interleave(base, detail, 2), [0, 1, 10, 2, 3, 11, 4, 5, 12, 6, 7, 13],
           "two base rows, then the detail row, of each of the four positions of the patch in turn")

def test_interleave_at_patch_1_puts_one_behind_the_other(interleave):
    expect(interleave(torch.tensor([1.0, 2]), torch.tensor([3.0, 4, 5]), 1), [1, 2, 3, 4, 5],
           "a patch of one position has nothing to interleave: the base's rows, then the details'")

def test_interleave_moves_whole_rows(interleave):
    base, detail = torch.arange(8.0), torch.tensor([10.0, 11, 12, 13])
    weights = interleave(base[:, None] + torch.zeros(5), detail[:, None] + torch.zeros(5), 2)
    assert weights.shape == (12, 5), (
        "weights (8, 5) and (4, 5) should become (12, 5): rows move, columns stay")
    expect(weights, interleave(base, detail, 2)[:, None].expand(12, 5),
           "the rows of a weight should move as the elements of a bias do")

def test_interleave_gives_one_head_that_says_what_two_said(interleave):
    p, C, D = 2, 3, 6
    base, detail, tokens = random(p * p * C, 7), random(p * p * D, 7, seed=1), random(1, 6, 7, seed=2)
    fused = interleave(base, detail, p)
    assert fused.shape == (p * p * (C + D), 7), (
        f"heads of (12, 7) and (24, 7) should fuse to one of (36, 7): each row kept whole; got {fused.shape}")
    z, z_d, both = (rearrange(tokens @ head.T, "b (h w) (p q c) -> b c (h p) (w q)", h=2, p=p, q=p)
                    for head in (base, detail, fused))
    expect(both, torch.cat([z, z_d], dim=1),
           "unpatched as velocity does, the fused head should give [what final_layer gave, what O' gave]")

# ------------------------------------------------------------ flow_step

def test_flow_step_by_hand(flow_step):
    """A quarter of the way: [1, 2] - [8, -4] / 4"""
    expect(flow_step(channels(1, 2), channels(8, -4), 0.75, 0.5), channels(-1, 3),
           "from t = 0.75 to 0.5 the step is (0.5 - 0.75) u, which takes u / 4 away")

def test_flow_step_along_the_true_velocity_arrives(flow_step):
    z, noise = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    for t, t_next in ((1.0, 0.0), (0.9, 0.7), (0.3, 0.0), (0.2, 0.8)):
        expect(flow_step((1 - t) * z + t * noise, noise - z, t, t_next), (1 - t_next) * z + t_next * noise,
               f"the path is straight: from x at t = {t}, u = noise - z should lead to x at {t_next} exactly")

def test_flow_step_of_no_length_stays(flow_step):
    x = random(1, 3, 2, 2)
    expect(flow_step(x, random(1, 3, 2, 2, seed=1), 0.6, 0.6), x, "for t_next = t nothing should move")

def test_flow_step_may_be_cut_in_uneven_parts(flow_step):
    x = noise = random(1, 3, 2, 2)
    u = random(1, 3, 2, 2, seed=1)
    for t, t_next in ((1.0, 0.95), (0.95, 0.6), (0.6, 0.5), (0.5, 0.0)):
        x = flow_step(x, u, t, t_next)
    expect(x, noise - u, "with one u, the steps 1, 0.95, 0.6, 0.5, 0 should lead where one from 1 to 0 does")

# ------------------------------------------------------------ guidance

def test_guidance_by_hand(guidance):
    """From 1, 2.5 times the way to 3"""
    expect(guidance(torch.cat([channels(3), channels(1)]), 2.5), channels(6),
           "for prompt 3, negative 1, cfg 2.5: begin at 1, and go 2.5 times the way from there to 3")

def test_guidance_of_1_and_0_are_the_prompt_and_the_negative(guidance):
    prompts, negatives = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    u = torch.cat([prompts, negatives])
    expect(guidance(u, 1.0), prompts, "cfg = 1 is no guidance: the first half of the batch, the prompts'")
    expect(guidance(u, 0.0), negatives, "cfg = 0 leaves the prompt out: the second half, the negatives'")

def test_guidance_has_nothing_to_add_where_both_agree(guidance):
    u = random(2, 3, 4, 4)
    expect(guidance(torch.cat([u, u]), 4.5), u,
           "where prompt and negative agree there is no direction to go: u should stay as it is")

def test_guidance_pairs_each_prompt_with_its_own_negative(guidance):
    u = torch.cat([channels(1), channels(10), channels(0), channels(5)])
    expect(guidance(u, 2.0), torch.cat([channels(2), channels(15)]),
           "of [prompt 0, prompt 1, negative 0, negative 1], row i goes with row B + i")

# ------------------------------------------------------------ frechet_distance

def test_frechet_distance_by_hand(frechet_distance):
    """S1 S2 = [[20, 2], [8, 1]]: trace 21, determinant 4. The root's trace is sqrt(21 + 2 sqrt(4)) = 5."""
    s1, s2 = np.array([[5.0, 2], [2, 1]]), np.diag([4.0, 1])
    expect(frechet_distance(np.zeros(2), s1, np.zeros(2), s2), 1.0,
           "[[5, 2], [2, 1]] and diag(4, 1) have traces 6 and 5, the matrix root of their product also 5:"
           " the distance is 6 + 5 - 2 * 5")

def test_frechet_distance_of_a_gaussian_to_itself_is_0(frechet_distance):
    mu, s = np.array([1.0, 2]), np.array([[5.0, 2], [2, 1]])
    expect(frechet_distance(mu, s, mu, s), 0.0, "a distance from something to itself should be 0")

def test_frechet_distance_of_equal_covariances_is_that_of_the_means(frechet_distance):
    s = np.array([[5.0, 2], [2, 1]])
    expect(frechet_distance(np.array([1.0, 1]), s, np.array([4.0, 5]), s), 25.0,
           "with equal covariances only |mu1 - mu2|^2 is left: 3^2 + 4^2")

def test_frechet_distance_compares_deviations(frechet_distance):
    """Diagonal: the sum of (sigma1 - sigma2)^2 = (1 - 3)^2 + (2 - 5)^2"""
    s1, s2, mu = np.diag([1.0, 4]), np.diag([9.0, 25]), np.zeros(2)
    expect([frechet_distance(mu, s1, mu, s2), frechet_distance(mu, s2, mu, s1)], [13.0, 13.0],
           "variances 1, 4 against 9, 25, independent: (1 - 3)^2 + (2 - 5)^2, whichever comes first")

def test_frechet_distance_of_few_pictures(frechet_distance):
    """One direction only, of variance 1: 1^2 + ... + 24^2 = 70^2. Against unit variance: 1 + 24 - 2 * 1"""
    v, mu = np.arange(1.0, 25) / 70, np.zeros(24)
    expect(frechet_distance(mu, np.outer(v, v), mu, np.eye(24)), 23.0,
           "a covariance of few pictures is singular, and rounding may make its zero eigenvalues negative:"
           " their roots should count as 0")
