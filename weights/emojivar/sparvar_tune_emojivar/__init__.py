"""The weights of emojivar, its yardsticks and its model card; `sparvar_tune.emojivar` is the code."""
