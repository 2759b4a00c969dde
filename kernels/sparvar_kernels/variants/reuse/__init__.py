"""The decision scale's output again."""
