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

A drafted token never walks from the root: the winner remembers its last position, whose own
context node is one or two parents below the context extended by the winner.

Chosen over a suffix automaton (its clones copy transitions, and counting needs the same walk
over suffix links, without a bound on their number in repetitive text) and over hash tables of
all context lengths (one entry per token *and* length).

Source of the idea to draft from such counts: SuffixDecoding (2411.04975); structure: Weiner's
suffix tree with Patricia descent.
"""

from __future__ import annotations

from collections import namedtuple

import numba
import numpy as np

from .compiled import address_as_pointer, compiled

#: Longest context the layout has room for; also the padding in front of each text.
MAX_DEPTH = 128
#: Stands before the first token and between documents. Never drafted.
NO_TOKEN = -1
ROOT = 0

NODE = np.dtype(
    [
        ("parent", np.int32),
        ("depth", np.int32),  # tokens in its longest context
        ("position", np.int32),  # where one of its contexts ends
        ("first_token", np.int32),  # first token, backwards, of the edge from its parent
        ("occurrences", np.int32),
        ("best_token", np.int32),  # its most frequent successor, the latest among equals
        ("best_count", np.int32),
        ("best_position", np.int32),  # where that successor last stood
    ]
)
CHILD = np.dtype([("parent", np.int32), ("node", np.int32)])  # node 0: empty

#: Memory of one text: `[MAX_DEPTH + capacity]` tokens, the node of each position's context,
#: the nodes, and the children as an open-addressing table keyed by (parent, first token).
SuffixIndex = namedtuple("SuffixIndex", "tokens terminals nodes children")

BYTES_PER_TOKEN = 4 + 4 + 2 * NODE.itemsize + 4 * CHILD.itemsize


def bytes_needed(capacity: int) -> int:
    """Bytes of an index with room for `capacity` tokens, a power of two: 104 per token."""
    return 4 * MAX_DEPTH + BYTES_PER_TOKEN * capacity + NODE.itemsize


@compiled
def index_at(address, capacity):
    """The index that lives at `address`; memory that is all zero is an empty one."""
    tokens = address
    terminals = tokens + 4 * (MAX_DEPTH + capacity)
    children = terminals + 4 * capacity
    nodes = children + 8 * 4 * capacity
    return SuffixIndex(
        numba.carray(address_as_pointer(tokens), (MAX_DEPTH + capacity,), np.int32),
        numba.carray(address_as_pointer(terminals), (capacity,), np.int32),
        numba.carray(address_as_pointer(nodes), (2 * capacity + 1,), NODE),
        numba.carray(address_as_pointer(children), (4 * capacity,), CHILD),
    )


@compiled
def clear(index):
    """Make an empty index. Returns its number of nodes, 1."""
    index.tokens[:MAX_DEPTH] = NO_TOKEN
    children = index.children
    for entry in range(len(children)):
        children[entry].node = 0
    root = index.nodes[ROOT]
    root.parent, root.depth, root.occurrences, root.best_count = ROOT, 0, 0, 0
    return 1


@compiled
def _entry_of(index, parent, token):
    """Where (parent, token) is in the table of children, or the empty place where it belongs."""
    children, nodes = index.children, index.nodes
    mask = len(children) - 1
    key = (np.int64(parent) << 32) ^ np.int64(token)
    key *= np.int64(-7046029254386353131)  # 2^64 / golden ratio
    key ^= key >> 29
    key *= np.int64(-4658895280553007687)
    entry = (key >> 33) & mask
    while children[entry].node != 0:
        if children[entry].parent == parent and nodes[children[entry].node].first_token == token:
            break
        entry = (entry + 1) & mask
    return entry


@compiled
def _adopt(index, parent, token, node):
    entry = index.children[_entry_of(index, parent, token)]
    entry.parent, entry.node = parent, node


@compiled
def move(old, new, num_tokens, num_nodes):
    """Copy an index into larger, zeroed memory."""
    new.tokens[: MAX_DEPTH + num_tokens] = old.tokens[: MAX_DEPTH + num_tokens]
    new.terminals[:num_tokens] = old.terminals[:num_tokens]
    new.nodes[:num_nodes] = old.nodes[:num_nodes]
    for node in range(1, num_nodes):
        _adopt(new, new.nodes[node].parent, new.nodes[node].first_token, node)


@compiled
def descend(index, text, end, max_depth, path):
    """Follow the context that ends at `text[end]` as far as the tree knows it.

    Returns:
        Number of nodes written to `path`, root's child first, and the number of tokens
        matched. Only the last node may be deeper than the match.
    """
    nodes = index.nodes
    node, length = ROOT, 0
    while nodes[node].depth < max_depth:
        entry = _entry_of(index, node, text[end - nodes[node].depth])
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
def append(index, num_tokens, num_nodes, token, max_match, path):
    """Index one token; `vote` for it next.

    Returns:
        Number of nodes, and length of `path`: the nodes of the new context, shortest first.
    """
    nodes, max_depth = index.nodes, max_match + 1
    end = MAX_DEPTH + num_tokens
    index.tokens[end] = token
    length, matched = descend(index, index.tokens, end, max_depth, path)
    if length > 0 and matched < nodes[path[length - 1]].depth:
        # The context leaves the tree inside an edge: a new node there takes over the
        # occurrences, and the winner among their successors.
        below, middle = path[length - 1], num_nodes
        num_nodes += 1
        parent = nodes[below].parent
        index.children[_entry_of(index, parent, nodes[below].first_token)].node = middle
        nodes[middle] = nodes[below]
        nodes[middle].depth = matched
        nodes[below].parent = middle
        nodes[below].first_token = index.tokens[MAX_DEPTH + nodes[below].position - matched]
        _adopt(index, middle, nodes[below].first_token, below)
        path[length - 1] = middle
    if matched < max_depth:
        leaf = num_nodes
        num_nodes += 1
        parent = path[length - 1] if length > 0 else ROOT
        node = nodes[leaf]
        node.parent, node.depth, node.position = parent, max_depth, num_tokens
        node.first_token = index.tokens[end - matched]
        node.occurrences, node.best_token, node.best_count = 0, NO_TOKEN, 0
        node.best_position = -1
        _adopt(index, parent, node.first_token, leaf)
        path[length] = leaf
        length += 1
    for step in range(length):
        nodes[path[step]].occurrences += 1
    index.terminals[num_tokens] = path[length - 1]
    return num_nodes, length


@compiled
def vote(index, position, max_match, path, length):
    """Count the token at `position`, just appended along `path`, for all contexts before it."""
    nodes = index.nodes
    token = index.tokens[MAX_DEPTH + position]
    node, step = index.terminals[position - 1], length - 1
    while node != ROOT:
        parent = nodes[node].parent
        if nodes[parent].depth < max_match:
            extended = min(nodes[node].depth, max_match) + 1
            while step > 0 and nodes[path[step - 1]].depth >= extended:
                step -= 1
            count = nodes[path[step]].occurrences
            if count >= nodes[node].best_count:
                nodes[node].best_token = token
                nodes[node].best_count = count
                nodes[node].best_position = position
        node = parent


@compiled
def path_to(index, node, path):
    """Write the nodes from `node` up to the root's child, deepest first. Returns how many."""
    length = 0
    while node != ROOT:
        path[length] = node
        length += 1
        node = index.nodes[node].parent
    return length


@compiled
def longest_repeated(index, position, max_match):
    """The longest context at the end of the text, which ends at `position`, that came before.

    Returns:
        Its node, or ROOT, and how often it came before: how often something followed it.
    """
    nodes = index.nodes
    node = index.terminals[position]
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
        path: The nodes of the text's last context: its last token has no successor yet.
        length: Number of nodes in `path`.

    Returns:
        The node, or ROOT, and how often it was followed.
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


@compiled
def context_node(index, position, length):
    """The node of the `length` tokens that end at `position`."""
    nodes = index.nodes
    node = index.terminals[position]
    while nodes[nodes[node].parent].depth >= length:
        node = nodes[node].parent
    return node
