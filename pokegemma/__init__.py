"""Fine-tune Gemma 3 on recorded Pokémon play; measure, export and serve it."""

import os

# The OpenMP library of torch and of llama.cpp reads this when it is loaded, and processes started from here inherit it.
# Its threads wait for each other in a loop, by default for about 3 ms, which is longer than a time slice. Next to other
# busy processes that loop takes the time that the awaited thread needs. After this many rounds they sleep instead.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
