"""emojivar: a second trained VAR, unlike pocketvar where it can be (weights/emojivar has its weights and its card)."""
