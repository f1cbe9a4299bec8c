"""Perturbation methods: coalitions of an input's parts, the scores without the others, and linear models of them."""
