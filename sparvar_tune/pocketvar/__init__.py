"""pocketvar: a small real VAR in the box, with Infinity's 13-scale square schedule (see MODEL_CARD.md)."""
