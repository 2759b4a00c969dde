"""A model samples with its tuned profile: the README's lines, with the model in the box. Writes dense.png and tuned.png."""

import torch
from PIL import Image

import sparvar_tune
from sparvar_tune.pocketvar.model import CLASSES, Generation, draw_noise, load_pocketvar

model = load_pocketvar()


def picture(name: str) -> torch.Tensor:
    noise = draw_noise(model.schedule, model.config.bits, seed=7)
    drawn = Generation(model, [CLASSES.index("cat")], noise, temperature=0.7).run().pictures()  # [1, 3, 256, 256] in 0..1
    Image.fromarray((drawn[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(f"{name}.png")
    return drawn


tuned = sparvar_tune.load_profile("pocketvar", gpu="cpu")
print(tuned.explain())  # which profile, what runs sparse here, and why the rest does not

dense_picture = picture("dense")
applied = sparvar_tune.apply(model, tuned)
tuned_picture = picture("tuned")
applied.undo()  # the model attends densely again

error = (dense_picture - tuned_picture).square().mean()
print(f"PSNR of tuned against dense, same noise: {-10 * error.log10():.1f} dB")
