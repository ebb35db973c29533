#!/bin/sh
# Scores, rates, classifies and draws the records of demo.fa with dna.bin and apes.bin: `make demo-dna`.
# They were written by hand: random letters, a published consensus of the Alu repeat, and the human cytochrome b of the rCRS.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

run() {
    printf '\n$ mamba %s\n' "$*"
    ./mamba "$@"
}

# A bedGraph as a line of bars for each record, one for every 10 bases: the higher, the better they were foreseen.
draw() {
    awk -F '\t' '
        BEGIN { split("▁ ▂ ▃ ▄ ▅ ▆ ▇ █", bar, " ") }
        NF == 4 { if ($1 != name) { name = $1; names[++n] = name }
                  column = int($2 / 10); sum[name, column] += $4; count[name, column]++; if (column > last[name]) last[name] = column }
        END { for (i = 1; i <= n; i++) {
                  line = ""
                  for (c = 0; c <= last[names[i]]; c++) {
                      level = 1 + int((sum[names[i], c] / count[names[i], c] + 1.8) / 1.6 * 7 + 0.5)
                      line = line bar[level < 1 ? 1 : level > 8 ? 8 : level]
                  }
                  printf "%-13s%s\n", names[i], line } }' "$1"
}

echo "Bits per base: 2 is what a coin of four sides has, less is what the model foresees."
run score models/dna.bin -q --fasta models/demo.fa

run score models/dna.bin -q --fasta models/demo.fa --rc-average --track "$work/demo.bedgraph" > /dev/null
draw "$work/demo.bedgraph"

printf '\nThree changes of one base of the Alu, its 20th, where its consensus has a CpG, which often mutates to TG:\n'
printf '##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\nalu\t330\t.\tC\tA,G,T\t.\t.\t.\n' > "$work/demo.vcf"
run score models/dna.bin -q --fasta models/demo.fa --vcf "$work/demo.vcf" --tsv --rc-average

printf '\nWhose cytochrome b? (No individual of demo.fa was in the training set.)\n'
printf 'cytochrome_b\t0\t1024\n' > "$work/demo.bed"
run classify models/apes.bin -q --fasta models/demo.fa --bed "$work/demo.bed"

printf '\nMore letters:\n'
run models/dna.bin -q --fasta models/demo.fa --bed "$work/demo.bed" -n 60 -s 1 --temp 1 --fasta-out -
