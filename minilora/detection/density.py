"""HDBSCAN (Campello, Moulavi and Sander 2013; McInnes and Healy 2017): clusters of rows where they lie dense.

Exact, in NumPy, with distances computed row by row: N rows take time in N^2 and memory in N. The steps: core distances,
the minimum spanning tree of mutual reachability (Prim), the tree of merges, the same without splits that leave fewer
than `least` rows, and of the clusters in it those whose excess of mass is largest. Left out: a cluster of all rows.
"""

import numpy as np

AT_ONCE = 256  # rows whose distances are held at once


def hdbscan(points, neighbours, least):
    """The cluster of each of `points` float64 [N, D], int64 [N]; -1 for noise.

    neighbours  a point's core distance is that of its n-th nearest point, itself counted (as scikit-learn counts)
    least       points of a cluster, at least 2
    """
    count = len(points)
    if count < max(2, least):
        return np.full(count, -1)
    edges = spanning_tree(points, core_distances(points, min(neighbours, count)))
    home, parents, stability = condense(merges(edges), count, max(2, least))
    chosen = choose(parents, stability)
    return np.unique(chosen[home], return_inverse=True)[1].ravel() - bool((chosen[home] < 0).any())


def distances(points, index):
    """Euclidean, float64 [len(index), N]."""
    return np.sqrt(((points[index][:, None] - points[None]) ** 2).sum(axis=-1))


def core_distances(points, neighbours):
    parts = [np.arange(start, min(start + AT_ONCE, len(points))) for start in range(0, len(points), AT_ONCE)]
    return np.concatenate([np.partition(distances(points, part), neighbours - 1)[:, neighbours - 1] for part in parts])


def spanning_tree(points, core):
    """Edges (from, to, distance) of the minimum spanning tree under max(core, core, distance), shortest first."""
    count = len(points)
    near, best, edges = np.zeros(count, np.int64), np.full(count, np.inf), []
    inside, at = np.zeros(count, bool), 0
    for _ in range(count - 1):
        inside[at] = True
        reach = np.maximum(np.maximum(core, core[at]), distances(points, [at])[0])
        closer = ~inside & (reach < best)
        best[closer], near[closer] = reach[closer], at
        at = int(np.where(inside, np.inf, best).argmin())
        edges.append((int(near[at]), at, float(best[at])))
    return sorted(edges, key=lambda edge: edge[2])


def merges(edges):
    """[(node, node, distance, rows)] of the tree of merges: merge i makes the node N + i of two earlier ones."""
    count = len(edges) + 1
    top, sizes, made = list(range(2 * count - 1)), [1] * count, []

    def root(node):
        while top[node] != node:
            top[node] = top[top[node]]
            node = top[node]
        return node

    for one, other, distance in edges:
        one, other = root(one), root(other)
        top[one] = top[other] = count + len(made)
        sizes.append(sizes[one] + sizes[other])
        made.append((one, other, distance, sizes[-1]))
    return made


def condense(tree, count, least):
    """(The cluster that each point leaves last, int64 [N]; the parent of each cluster; its stability).

    Cluster 0 holds all. A split into two parts of at least `least` points makes two clusters, any other only loses
    points. Stability: the sum over points of 1/distance where they leave, less that where the cluster begins.
    """
    longest = tree[-1][2] or 1.0
    home, parents, births, stability = np.zeros(count, np.int64), [-1], [0.0], [0.0]

    def rows_of(node):
        return 1 if node < count else tree[node - count][3]

    stack = [(count + len(tree) - 1, 0)]
    while stack:
        node, cluster = stack.pop()
        *parts, distance, _ = tree[node - count]
        density = 1 / max(distance, 1e-9 * longest)
        splits = all(rows_of(part) >= least for part in parts)
        for part in parts:
            if splits or rows_of(part) < least:
                stability[cluster] += rows_of(part) * (density - births[cluster])
            if splits:
                stack.append((part, len(parents)))
                parents.append(cluster)
                births.append(density)
                stability.append(0.0)
            elif rows_of(part) >= least:
                stack.append((part, cluster))
            else:
                home[points_below(tree, part, count)] = cluster
    return home, parents, stability


def points_below(tree, node, count):
    found, stack = [], [node]
    while stack:
        node = stack.pop()
        if node < count:
            found.append(node)
        else:
            stack += tree[node - count][:2]
    return found


def choose(parents, stability):
    """For each cluster the chosen one that it is in, int64 [clusters]: -1 for none.

    A cluster is chosen if it is at least as stable as what can be chosen below it, and none above it is chosen.
    """
    below, best = np.zeros(len(parents)), np.array(stability)
    for cluster in range(len(parents) - 1, 0, -1):  # a cluster's number is above its parent's
        best[cluster] = max(stability[cluster], below[cluster])
        below[parents[cluster]] += best[cluster]
    chosen = np.full(len(parents), -1)
    for cluster in range(1, len(parents)):
        above = chosen[parents[cluster]]
        chosen[cluster] = above if above >= 0 else cluster if stability[cluster] >= below[cluster] else -1
    return chosen
