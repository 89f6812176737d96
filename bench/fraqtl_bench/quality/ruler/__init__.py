"""RULER's generated tasks, and multi-round co-reference in the shape of MRCR.

RULER (Hsieh and others, 2024, arXiv 2404.06654) hides needles in noise, in prose and among other needles, variables
that were set to one another, and words that are more frequent than others. Names of tasks, numbers of needles, hops,
repeats and the scoring are RULER's: the share of the answers that stand in the reply. Its `qa_1` and `qa_2` ask about
Wikipedia and are left out. MRCR (Vodrahalli and others, 2024, arXiv 2409.12640; the data set openai/mrcr) hides equal
requests in a long chat and asks for the reply to one of them.

All text is made up here, so that nothing is downloaded and no model has seen it. Where that, or small models with short
contexts, lead to something else than published:

- Numbers have four digits, not seven, and variables three letters, not five: answers stay short.
- Prose is made of sentences of a small grammar, not of essays. Keys are single words, not pairs of words.
- Common words are five made-up words, not ten English ones. The repeats below 4,096 tokens are those of RULER's code.
- `vt` and `cwe` show one solved example, as RULER does, but as an earlier turn of the chat.
- A reply may have twice the tokens of the answer and a few more, not 30 to 128, so that methods are compared and not
  patience. An answer counts if it stands there as whole words; RULER takes parts of words too.
- `mrcr_2` asks for one of two replies of a sentence each. It counts if it is whole: among sentences of one grammar,
  MRCR's ratio of equal characters would be high for the wrong one. There is no random string to begin with.

Replies are decoded greedily, in the lab with each method's cache and through a server with temperature 0. Teacher
forcing would save a few steps behind a long prompt, but give something else where answers may come in any order.
"""
