"""What a layer's table of a decoding step holds for each thread: stages, and where to find what in their outputs."""

from __future__ import annotations

# The products of a layer; the output layer; behind a sparse gate up alone, or up and down of a unit side by side; of
# latent attention the second half of the queries' way, and what stands before and behind the sums over tokens.
QKV, OUTPUT, GATE_UP, DOWN, HEAD, UP, UNITS_BUNDLED, QUERIES, ABSORB, EXPAND = range(10)
STAGES = 10

# Fields of a layer and thread, int64: the first product and the number of products of each stage, then places.
PLACES = 2 * STAGES
QUERY_AT, KEY_AT, VALUE_AT, GATE_AT, UP_AT, WINDOW, FIRST_HEAD, HEADS, UNITS, FIRST_UNIT, ACTIVATION = range(
    PLACES, PLACES + 11
)
# All units of an MLP whose threads meet over their gates (for a statistical top-k, or normalised powers), else 0;
# features that choose the keys, and how many keys. How query and key turn; UP_AT is negative if the MLP has no gate,
# and up stands in its place.
ALL_UNITS, CHOOSING, KEYS, TURN = range(PLACES + 11, PLACES + 15)
# Which rotary table; from one key-value head to the next, in the outputs, of its queries and of key and value.
ROTARY, QUERY_STEP, KEY_STEP = range(PLACES + 15, PLACES + 18)
# Of what the heads of latent attention share (what queries go through at KEY_AT, latent and key at VALUE_AT): the first
# number that this thread computes, and how many.
FIRST_NARROW, NARROW, FIRST_LATENT, LATENT = range(PLACES + 18, PLACES + 22)
LAYER_FIELDS = PLACES + 22
UNTURNED, HALVES, NEIGHBOURS = range(3)
