# make            builds ./mamba (CPU)
# make demo       builds it and tells a story
# make demo-dna   scores, classifies and draws the DNA of models/demo.fa
# make test       quick tests, under five minutes          (python3; its packages come from PyPI into $(VENV))
# make check      those, and the slow ones: PyTorch, llama.cpp, sanitizers, linters; what CI runs
# make fuzz       mutated files and requests in every parser, SECONDS=60 each     (clang with libFuzzer)
# make bench      tokens per second here and in llama.cpp, side by side; plots in tests/bench/results
# make install    into PREFIX (/usr/local)

PREFIX ?= /usr/local
CFLAGS ?= -O2 -g
WARNINGS = -Wall -Wextra
# No contraction: a fused multiply-add happens where it is written and nowhere else, or instruction sets would disagree.
FLAGS = -std=gnu11 -ffp-contract=off $(WARNINGS) $(OPENMP)
LIBS = -lm
PYTHON ?= python3
VENV ?= $(HOME)/.cache/mamba-tests/venv

# A compiler without its OpenMP library still builds a program that uses one thread.
HASH := \#
OPENMP := $(shell printf '$(HASH)include <omp.h>\nint main(void){return omp_get_max_threads()<0;}\n' | \
	$(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)

all: mamba

mamba: mamba.c Makefile
	$(CC) $(CFLAGS) $(FLAGS) $< -o $@ $(LDFLAGS) $(LIBS)

demo: mamba
	./mamba models/tales.bin -p "Once upon a time" -n 300 --temp 0.6 -s 21 --echo

demo-dna: mamba
	models/demo_dna.sh

test: mamba tests/unit $(VENV)/quick
	$(VENV)/bin/python tests/run.py quick

check: test $(VENV)/full
	$(VENV)/bin/python tests/run.py slow

tests/unit: tests/unit.c mamba.c Makefile
	$(CC) $(CFLAGS) $(FLAGS) -Wno-unused-function $< -o $@ $(LDFLAGS) $(LIBS)

# The stamps hold the requirements that were installed; other requirements make another installation.
$(VENV)/quick: tests/requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	cmp -s $< $@ || $(VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	cp $< $@

$(VENV)/full: tests/requirements-check.txt $(VENV)/quick
	cmp -s $< $@ || $(VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	cp $< $@

SECONDS ?= 60
fuzz:
	$(PYTHON) tests/fuzz/run.py $(SECONDS)

bench: mamba $(VENV)/full
	$(VENV)/bin/python tests/bench/compare_llama.py
	$(VENV)/bin/python tests/bench/plots.py

install: mamba
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/mamba
	install -m 755 mamba $(DESTDIR)$(PREFIX)/bin/mamba
	install -m 644 tokenizer.bin $(DESTDIR)$(PREFIX)/share/mamba/tokenizer.bin

clean:
	rm -f mamba tests/unit

.PHONY: all demo demo-dna test check fuzz bench install clean
