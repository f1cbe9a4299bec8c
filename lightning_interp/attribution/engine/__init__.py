"""The engine of gradient methods: one forward and one backward, which several methods share."""
