"""One file a retraining tweak; `registry` finds them."""
