"""An incremental suffix tree over contexts, with the vote on what follows each context.

The tree holds, for every position of a text, the context that ends there, *read backwards*
and cut at `max_match + 1` tokens. A node stands for the contexts that share the same
occurrences; an edge is labelled by tokens of the text itself, so only branching contexts
take memory (at most two nodes per token). Appending a token walks once from the root to the
new context, at most `max_match + 1` nodes and about ten in ordinary text, whatever the
length of the text. On the way it

* finds the longest suffix that occurred before (where the walk left the tree),
* counts the occurrence on every context it passes, and
* updates the winner among the successors of every context that ended one token earlier:
  occurrences of context + token are the occurrences of a node on the new path, so the most
  frequent successor, the most recent among equals, is known without a table of successors.

A drafted token never walks from the root: each context remembers the node of itself extended
by its winner. Nor does an appended token that some context of the text's end would have drafted.

Chosen over a suffix automaton (its clones copy transitions, and counting needs the same walk
over suffix links, without a bound on their number in repetitive text) and over hash tables of
all context lengths (one entry per token *and* length).

Source of the idea to draft from such counts: SuffixDecoding (2411.04975); structure: Weiner's
suffix tree with Patricia descent.
"""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING

import numba
import numpy as np

from .compiled import address_as_pointer, compiled, place, spread

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Longest context the layout has room for; also the padding in front of each text.
MAX_DEPTH = 128
#: Stands before the first token and between documents. Never drafted.
NO_TOKEN = -1
ROOT = 0

NODE = np.dtype(
    [
        ("parent", np.int32),
        ("depth", np.int32),  # tokens in its longest context
        ("position", np.int32),  # where its contexts last ended
        ("first_token", np.int32),  # first token, backwards, of the edge from its parent
        ("occurrences", np.int32),
        ("best_token", np.int32),  # its most frequent successor, the latest among equals
        ("best_count", np.int32),
        ("best_node", np.int32),  # at or below the node of the context extended by it
    ]
)
CHILD = np.dtype([("parent", np.int32), ("node", np.int32)])  # node 0: empty

#: Memory of one text: `[MAX_DEPTH + capacity]` tokens, `[2 * capacity + 1]` nodes, and the
#: children: an open-addressing table of `[3 * capacity]`, keyed by (parent, first token).
SuffixIndex = namedtuple("SuffixIndex", "tokens nodes children")

NODE_BYTES, CHILD_BYTES = NODE.itemsize, CHILD.itemsize
BYTES_PER_TOKEN = 4 + 2 * NODE.itemsize + 3 * CHILD.itemsize


def bytes_needed(capacity: int) -> int:
    """Bytes of an index with room for `capacity` tokens: 92 per token."""
    return 4 * MAX_DEPTH + NODE.itemsize + BYTES_PER_TOKEN * capacity


def text(block: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The indexed tokens in a block of memory, and what lies behind them."""
    return block.view(np.int32)[MAX_DEPTH:]


@compiled
def nodes_offset(capacity):
    """Bytes from the address of an index to its nodes."""
    return 4 * (MAX_DEPTH + capacity)


@compiled
def children_offset(capacity):
    """Bytes from the address of an index to its table of children."""
    return nodes_offset(capacity) + NODE_BYTES * (2 * capacity + 1)


@compiled
def index_at(address, capacity):
    """The index in the memory at `address`; `clear` it before first use."""
    nodes = address + nodes_offset(capacity)
    children = address + children_offset(capacity)
    return SuffixIndex(
        numba.carray(address_as_pointer(address), (MAX_DEPTH + capacity,), np.int32),
        numba.carray(address_as_pointer(nodes), (2 * capacity + 1,), NODE),
        numba.carray(address_as_pointer(children), (3 * capacity,), CHILD),
    )


@compiled
def clear(index):
    """Make an empty index. Returns its number of nodes, 1."""
    index.tokens[:MAX_DEPTH] = NO_TOKEN
    for entry in range(len(index.children)):
        index.children[entry].node = 0
    root = index.nodes[ROOT]
    root.parent, root.depth, root.occurrences, root.best_count = ROOT, 0, 0, 0
    return 1


@compiled
def child_entry(index, parent, token):
    """Where (parent, token) is in the table of children, or the empty place where it belongs."""
    children, nodes = index.children, index.nodes
    entry = place(spread(parent, token), len(children))
    while children[entry].node != 0:
        if children[entry].parent == parent and nodes[children[entry].node].first_token == token:
            break
        entry += 1
        if entry == len(children):
            entry = 0
    return entry


@compiled
def _adopt(index, parent, token, node):
    entry = index.children[child_entry(index, parent, token)]
    entry.parent, entry.node = parent, node


@compiled
def move(old, new, num_tokens, num_nodes):
    """Copy an index into larger memory."""
    clear(new)
    new.tokens[: MAX_DEPTH + num_tokens] = old.tokens[: MAX_DEPTH + num_tokens]
    new.nodes[:num_nodes] = old.nodes[:num_nodes]
    for node in range(1, num_nodes):
        _adopt(new, new.nodes[node].parent, new.nodes[node].first_token, node)


@compiled
def descend(index, text, end, max_depth, start, path):
    """Follow the context that ends at `text[end]` as far as the tree knows it.

    Args:
        index: The tree.
        text: `[MAX_DEPTH + n]` tokens, with the padding in front.
        end: Where the context ends, in `text`.
        max_depth: Longest context to follow.
        start: A node on the way, or ROOT. Its own longest context may go beyond the way.
        path: `[MAX_DEPTH + 2]` int32, written: the nodes passed, root's child first.

    Returns:
        Number of nodes written and the number of tokens matched. Only the last node may be
        deeper than the match.
    """
    nodes = index.nodes
    length, node = path_to(index, start, path), start
    while nodes[node].depth < max_depth:
        entry = child_entry(index, node, text[end - nodes[node].depth])
        node = index.children[entry].node
        if node == 0:
            break
        path[length] = node
        length += 1
    if length == 0:
        return 0, 0
    # Only first tokens of edges were compared. All nodes passed share the text of the
    # deepest one, so one comparison tells how far the descent was right.
    deepest = nodes[path[length - 1]]
    known, other = index.tokens, MAX_DEPTH + deepest.position
    depth, matched = min(deepest.depth, max_depth), 1
    while matched < depth and known[other - matched] == text[end - matched]:
        matched += 1
    while length > 1 and nodes[path[length - 2]].depth >= matched:
        length -= 1
    return length, matched


@compiled
def append(index, num_tokens, num_nodes, token, max_match, start, path):
    """Index one token; `vote` for it next.

    Args:
        index: Of the text so far.
        num_tokens: Tokens in it.
        num_nodes: Nodes in it.
        token: The one to append.
        max_match: Longest context anyone will ask for; one token more is indexed.
        start: From `known_extension`, or ROOT.
        path: `[MAX_DEPTH + 2]` int32, written: the nodes of the new context, shortest first.

    Returns:
        Number of nodes, and length of `path`.
    """
    nodes, max_depth = index.nodes, max_match + 1
    end = MAX_DEPTH + num_tokens
    index.tokens[end] = token
    length, matched = descend(index, index.tokens, end, max_depth, start, path)
    if length > 0 and matched < nodes[path[length - 1]].depth:
        # The context leaves the tree inside an edge: a new node there takes over the
        # occurrences, and the winner among their successors.
        below, middle = path[length - 1], num_nodes
        num_nodes += 1
        parent = nodes[below].parent
        index.children[child_entry(index, parent, nodes[below].first_token)].node = middle
        nodes[middle] = nodes[below]
        nodes[middle].depth = matched
        nodes[below].parent = middle
        nodes[below].first_token = index.tokens[MAX_DEPTH + nodes[below].position - matched]
        _adopt(index, middle, nodes[below].first_token, below)
        path[length - 1] = middle
    if matched < max_depth:
        leaf = num_nodes
        num_nodes += 1
        node = nodes[leaf]
        node.parent = path[length - 1] if length > 0 else ROOT
        node.depth, node.position = max_depth, num_tokens
        node.first_token = index.tokens[end - matched]
        node.occurrences, node.best_count = 0, 0
        node.best_token, node.best_node = NO_TOKEN, ROOT
        _adopt(index, node.parent, node.first_token, leaf)
        path[length] = leaf
        length += 1
    for step in range(length):
        nodes[path[step]].occurrences += 1
        nodes[path[step]].position = num_tokens
    return num_nodes, length


@compiled
def vote(index, node, token, max_match, path, length):
    """Count a token, just appended along `path`, for every context that it followed.

    Args:
        index: Of the text with the token.
        node: Deepest node of the context before the token.
        token: The token.
        max_match: Longest context that has a vote.
        path: From `append`.
        length: From `append`.
    """
    nodes, step = index.nodes, length - 1
    while node != ROOT:
        parent = nodes[node].parent
        if nodes[parent].depth < max_match:
            after = min(nodes[node].depth, max_match) + 1
            while step > 0 and nodes[path[step - 1]].depth >= after:
                step -= 1
            count = nodes[path[step]].occurrences
            if count >= nodes[node].best_count:
                nodes[node].best_token = token
                nodes[node].best_count = count
                nodes[node].best_node = path[step]
        node = parent


@compiled
def path_to(index, node, path):
    """Write the nodes from the root's child down to `node`. Returns how many."""
    length, above = 0, node
    while above != ROOT:
        length += 1
        above = index.nodes[above].parent
    for step in range(length - 1, -1, -1):
        path[step] = node
        node = index.nodes[node].parent
    return length


@compiled
def extended(index, node, length):
    """The node of a context followed by its winner, `length` tokens together."""
    nodes = index.nodes
    node = nodes[node].best_node
    while nodes[nodes[node].parent].depth >= length:
        node = nodes[node].parent
    return node


@compiled
def known_extension(index, node, token, max_match):
    """A node that the context about to end in `token` passes, without a walk from the root.

    Args:
        index: Of the text so far.
        node: Deepest node of its last context.
        token: The one to come.
        max_match: Longest context that has a vote.

    Returns:
        The deepest such node that some winner leads to, or ROOT.
    """
    nodes = index.nodes
    while node != ROOT:
        if nodes[node].best_token == token and nodes[node].best_count > 0:
            return extended(index, node, min(nodes[node].depth, max_match) + 1)
        node = nodes[node].parent
    return ROOT


@compiled
def longest_repeated(index, node, max_match):
    """The longest context at the end of the text that came before.

    Args:
        index: Of the text.
        node: Deepest node of the text's last context.
        max_match: Longest context wanted.

    Returns:
        Its node, or ROOT, and how often it came before: how often something followed it.
    """
    nodes = index.nodes
    while node != ROOT:
        parent = nodes[node].parent
        if nodes[node].occurrences > 1 and nodes[parent].depth < max_match:
            return node, nodes[node].occurrences - 1
        node = parent
    return ROOT, 0


@compiled
def longest_followed(index, node, max_match, path, length):
    """The longest context at or above `node` that something has followed.

    Args:
        index: Of the text.
        node: Where to start.
        max_match: Longest context wanted.
        path: Nodes of the text's last context: its last occurrence has no successor yet.
        length: Number of nodes in `path`.

    Returns:
        Its node, or ROOT, and how often it was followed.
    """
    nodes = index.nodes
    while node != ROOT:
        parent = nodes[node].parent
        if nodes[parent].depth < max_match:
            followed = nodes[node].occurrences
            for step in range(length):
                if path[step] == node:
                    followed -= 1
                    break
            if followed > 0:
                return node, followed
        node = parent
    return ROOT, 0
