# make            builds ./mamba (CPU)
# make cuda       builds ./mamba with the GPU backend (nvcc 12 or later)
# make demo       builds it and tells a story
# make demo-dna   scores, classifies and draws the DNA of models/demo.fa
# make demo-audio speaks digits into digits.wav and draws them in digits.png
# make test       quick tests, under five minutes          (python3; its packages come from PyPI into $(VENV))
# make check      those, and the slow ones: PyTorch, llama.cpp, sanitizers, linters; what CI runs
# make test-cuda  the GPU backend: emulated, and on a GPU where there is one
# make fuzz       mutated files and requests in every parser, SECONDS=60 each     (clang with libFuzzer)
# make bench      tokens per second here and in llama.cpp, side by side; plots in tests/bench/results
# make install    into PREFIX (/usr/local); make uninstall takes it out again

PREFIX ?= /usr/local
CFLAGS ?= -O2 -g
WARNINGS = -Wall -Wextra
# No contraction: a fused multiply-add happens where it is written and nowhere else, or instruction sets would disagree.
FLAGS = -std=gnu11 -ffp-contract=off $(WARNINGS) $(OPENMP)
LIBS = -lm
ifeq ($(shell uname), Linux)  # where musl gives a thread as much stack as the program says, else 128 KiB: a matrix product takes 240
STACK = -Wl,-z,stack-size=1048576
endif
PYTHON ?= python3
VENV ?= $(HOME)/.cache/mamba-tests/venv

# A compiler without its OpenMP library still builds a program that uses one thread.
HASH := \#
OPENMP := $(shell printf '$(HASH)include <omp.h>\nint main(void){return omp_get_max_threads()<0;}\n' | \
	$(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)

all: mamba

mamba: mamba.c Makefile
	$(CC) $(CPPFLAGS) $(CFLAGS) $(FLAGS) $< -o $@ $(STACK) $(LDFLAGS) $(LIBS)

# Code for every architecture from Turing to Blackwell that nvcc knows (8.9 runs that of 8.6, 10.3 that of 10.0), and two in PTX, from
# which the driver makes it for what else there is. cudart is linked statically: the program starts where there is no driver. ARCHS="90"
# builds for one alone, faster.
NVCC ?= nvcc
ARCHS ?= $(filter 75 80 86 90 100 120,$(patsubst sm_%,%,$(shell $(NVCC) --list-gpu-code 2>/dev/null)))
NVCC_FLAGS = -std=c++17 -O3 -fmad=false -t 2 -Xcompiler "-Wall,-ffp-contract=off$(OPENMP:%=,%)" \
	$(foreach a,$(ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
	$(foreach a,$(filter 80 $(lastword $(ARCHS)),$(ARCHS)),-gencode arch=compute_$(a),code=compute_$(a))

cuda: mamba.c mamba_cuda.cu Makefile
	@command -v $(NVCC) >/dev/null || { echo "make cuda needs nvcc, of CUDA 12 or later: install NVIDIA's CUDA toolkit" \
		"(Debian: nvidia-cuda-toolkit), or name it: make cuda NVCC=/usr/local/cuda/bin/nvcc" >&2; exit 1; }
	@major=$$($(NVCC) --version | sed -n 's/.*release \([0-9]*\).*/\1/p'); [ "$${major:-0}" -ge 12 ] || \
		{ echo "make cuda needs nvcc 12 or later; $(NVCC) is of CUDA $$major" >&2; exit 1; }
	$(NVCC) $(NVCC_FLAGS) $(NVCC_EXTRA) -c mamba_cuda.cu -o mamba_cuda.o
	$(CC) $(CPPFLAGS) $(CFLAGS) $(FLAGS) -DMAMBA_CUDA -c mamba.c -o mamba_main.o
	$(NVCC) -cudart static -Xcompiler "-static-libstdc++,-static-libgcc$(OPENMP:%=,%)" mamba_main.o mamba_cuda.o -o mamba $(LIBS)
	rm -f mamba_main.o mamba_cuda.o

demo: mamba
	./mamba models/tales.bin -p "Once upon a time" -n 300 --temp 0.6 -s 21 --echo

demo-dna: mamba
	models/demo_dna.sh

demo-audio: mamba $(VENV)/quick
	./mamba models/digits.bin --seconds 8 -s 1 -o digits.wav
	$(VENV)/bin/python models/draw_sound.py digits.wav digits.png
	@echo "digits.wav is the sound (aplay digits.wav), digits.png its waveform and spectrogram"

test: mamba tests/unit $(VENV)/quick
	$(VENV)/bin/python tests/run.py quick

# After the tests: they do not run while packages are exchanged below them.
check: test
	$(MAKE) $(VENV)/full
	$(VENV)/bin/python tests/run.py slow

test-cuda: mamba $(VENV)/full
	$(VENV)/bin/python tests/run.py cuda

tests/unit: tests/unit.c mamba.c Makefile
	$(CC) $(CPPFLAGS) $(CFLAGS) $(FLAGS) -Wno-unused-function $< -o $@ $(STACK) $(LDFLAGS) $(LIBS)

# The stamps hold the requirements that were installed; other requirements make another installation. Where venv failed before it
# had pip (Debian without python3-venv), it begins again.
$(VENV)/quick: tests/requirements.txt
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	cmp -s $< $@ || $(VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	cp $< $@

$(VENV)/full: tests/requirements-check.txt $(VENV)/quick
	cmp -s $< $@ || $(VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	cp $< $@

SECONDS ?= 60
fuzz:
	$(PYTHON) tests/fuzz/run.py $(SECONDS)

bench: mamba $(VENV)/full
	$(VENV)/bin/python tests/bench/compare_llama.py --json tests/bench/results/llama.json
	$(VENV)/bin/python tests/bench/plots.py

install: mamba
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/mamba"
	install -m 755 mamba "$(DESTDIR)$(PREFIX)/bin/mamba"
	install -m 644 tokenizer.bin "$(DESTDIR)$(PREFIX)/share/mamba/tokenizer.bin"

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/mamba" "$(DESTDIR)$(PREFIX)/share/mamba/tokenizer.bin"

clean:
	rm -f mamba digits.wav digits.png tests/unit mamba_main.o mamba_cuda.o

.PHONY: all cuda demo demo-dna demo-audio test check test-cuda fuzz bench install uninstall clean
