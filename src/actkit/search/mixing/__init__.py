"""Mixed recipes: another setting for each part of a model, chosen by what the parts can stand and what they cost.

ingredients    settings that can be limited to some layers (`only`), and what each makes of every layer
damage         of each, layer by layer, from one backward pass (`core/watch/damage.py`)
times          seconds per token from the bytes that a recipe reads, fitted to what was timed on this machine
choice         the cheapest option of each place at one price of damage; the price that meets the limit
rounds         what is tried: a mix, measured like every candidate, then another that corrects what was assumed
"""
