"""emojivar: a second trained VAR, unlike pocketvar where it can be (see MODEL_CARD.md)."""
