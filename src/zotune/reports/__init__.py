"""What single runs came to, as a page: `zotune report`. Pages of the benchmark are `zotune.bench.report`'s."""
