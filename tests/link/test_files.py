"""Files as people have them: what pandas, NumPy, SciPy, spreadsheets and SNAP write is read, or refused with a line."""

import gzip

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.io import mmwrite

from suffice.link.data.edge_rules import EdgeRules
from suffice.link.data.files import read_graph

EDGES = np.array([[2, 0], [1, 2], [3, 1]])
SORTED = [[0, 2], [1, 2], [1, 3]]
X = np.array([[0.5, 1.0, 0.0], [1.5, 0.0, 0.0], [2.5, 3.0, 1.0], [0.25, 1.0, 1.0]])
Y = np.array([1, 0, 1, 0])


@pytest.fixture
def write(tmp_path):
    """A function that writes files, given by name, and returns their paths."""

    def write(**texts):
        paths = []
        for name, text in texts.items():
            paths.append(tmp_path / name.replace("_", "."))
            paths[-1].write_text(text, encoding="utf-8", newline="")
        return paths

    return write


def lines(array, separator=","):
    return "\n".join(separator.join(map(str, row)) for row in array.tolist()) + "\n"


def check(graph):
    assert sorted(graph.edges.T.tolist()) == SORTED
    assert torch.equal(graph.x, torch.from_numpy(X).float())
    assert graph.y is None or graph.y.tolist() == Y.tolist()


# ---- Headers ---------------------------------------------------------------------------------------------------------


def save_with_pandas(folder, **options):
    pd = pytest.importorskip("pandas")
    frames = {"e": EDGES, "x": X, "y": Y}
    for name, values in frames.items():
        pd.DataFrame(values).to_csv(folder / f"{name}.csv", **options)
    return [folder / f"{name}.csv" for name in frames]


def test_the_default_header_of_pandas_is_refused_with_its_line(tmp_path):
    paths = save_with_pandas(tmp_path, index=False)
    with pytest.raises(ValueError, match=r"x\.csv must begin .*, got line 1, '0, 1, 2', which can be both\."):
        read_graph(*paths)
    check(read_graph(*paths, header=True))


def test_an_edge_list_that_begins_with_0_1_is_refused_with_its_line(write):
    e, x = write(e_csv="0,1\n2,0\n1,2\n3,1\n", x_csv=lines(X))
    with pytest.raises(ValueError, match=r"e\.csv must begin with a line that is either a header or an edge, .*'0, 1'"):
        read_graph(e, x)
    check(read_graph(e, x, header=True))
    assert read_graph(e, x, header=False).edges.T.tolist() == [[0, 1], [0, 2], [1, 2], [1, 3]]


@pytest.mark.parametrize("text", ["# FromNodeId ToNodeId\n0\t1\n1\t2\n", "0 1\n1 2\n", "%c\n0,1\n1,2\n"])
def test_edge_lists_that_pandas_does_not_write_may_begin_with_0_1(write, text):
    e, x = write(e_txt=text, x_csv=lines(X))
    assert read_graph(e, x).edges.T.tolist() == [[0, 1], [1, 2]]


def test_the_index_column_of_pandas_is_no_node_and_no_feature(tmp_path):
    check(read_graph(*save_with_pandas(tmp_path)))


def test_named_headers_are_recognised(write):
    e, x, y = write(e_csv="u,v\n" + lines(EDGES), x_csv="a,b,c\n" + lines(X), y_csv="y\n" + lines(Y[:, None]))
    check(read_graph(e, x, y))


@pytest.mark.parametrize("first", ["", "0\n"])
def test_the_number_of_nodes_tells_whether_labels_have_a_header(write, first):
    e, x, y = write(e_csv=lines(EDGES), x_csv=lines(X), y_csv=first + lines(np.array([[0], [1], [0], [1]])))
    assert read_graph(e, x, y).classes.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("first", ["", "class\n"])
def test_string_labels_without_a_header_keep_their_first_row(write, first):
    e, x, y = write(e_csv=lines(EDGES), x_csv=lines(X), y_csv=first + "b\na\nb\na\n")
    check(read_graph(e, x, y))


def test_labels_of_another_length_are_refused_with_the_first_line(write):
    e, x, y = write(e_csv=lines(EDGES), x_csv=lines(X), y_csv="0\n1\n")
    with pytest.raises(ValueError, match=r"labels must have 4 rows, one for each node, got 1 rows below line 1, '0'"):
        read_graph(e, x, y)


def test_a_byte_order_mark_drops_no_edge(tmp_path):
    (tmp_path / "e.csv").write_text(lines(EDGES), encoding="utf-8-sig")
    (tmp_path / "x.csv").write_text(lines(X), encoding="utf-8-sig")
    (tmp_path / "y.csv").write_text(lines(Y[:, None]), encoding="utf-8-sig")
    check(read_graph(*(tmp_path / f"{name}.csv" for name in "exy")))


# ---- Formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        lines(EDGES, " "),
        lines(EDGES, "\t"),
        lines(EDGES, ";"),
        lines(EDGES, ", "),
        "# comment\n# another one\n\n" + lines(EDGES, "  ") + "\n# the end\n",
        '"source","target"\r\n"2","0"\r\n"1","2"\r\n"3","1"\r\n',
        "weight,source,target\n.5,2,0\n1,1,2\n1,3,1\n",
        "2,0,.5\n1,2,1\n3,1,1\n",
        "2.0,0.0\n1.0,2.0\n3.0,1.0\n",
    ],
)
def test_text_files(write, text):
    check(read_graph(*write(e_txt=text, x_csv=lines(X))))


def test_compressed_text(tmp_path, write):
    with gzip.open(tmp_path / "web.txt.gz", "wt") as file:
        file.write("# Nodes: 4 Edges: 3\n" + lines(EDGES, "\t"))
    graph = read_graph(tmp_path / "web.txt.gz", *write(x_csv=lines(X)))
    check(graph)
    assert graph.name == "web"


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_matrix_market(tmp_path, is_symmetric):
    matrix = sparse.coo_array((np.ones(3), EDGES.T), (4, 4))
    mmwrite(tmp_path / "e.mtx", matrix + matrix.T if is_symmetric else matrix)
    mmwrite(tmp_path / "x.mtx", sparse.coo_array(X))
    np.save(tmp_path / "y.npy", Y)
    check(read_graph(*(tmp_path / name for name in ("e.mtx", "x.mtx", "y.npy"))))


@pytest.mark.parametrize("symmetry", ["general", "symmetric", "skew-symmetric"])
@pytest.mark.parametrize("field", ["pattern", "integer", "real", "complex"])
@pytest.mark.parametrize("kind", ["coordinate", "array"])
def test_all_headers_of_matrix_market(tmp_path, kind, field, symmetry):
    if field == "pattern" and (kind == "array" or symmetry == "skew-symmetric"):
        pytest.skip("not part of the format")
    generator = np.random.default_rng(0)
    matrix = np.triu(generator.integers(1, 9, (7, 7)) * (generator.random((7, 7)) < 0.4), 1)
    matrix += {"general": 0, "symmetric": matrix.T, "skew-symmetric": -matrix.T}[symmetry]
    stored = matrix if kind == "array" else sparse.coo_array(matrix)
    mmwrite(
        tmp_path / "e.mtx",
        stored.astype(complex) if field == "complex" else stored,
        "two\nlines",
        field,
        None,
        symmetry,
    )
    assert (
        (tmp_path / "e.mtx").read_text().startswith(f"%%MatrixMarket matrix {kind} {field} {symmetry}\n%two\n%lines\n")
    )
    graph = read_graph(tmp_path / "e.mtx", "degree")
    assert sorted(graph.edges.T.tolist()) == np.argwhere(np.triu(matrix)).tolist()
    assert graph.num_nodes == 7
    refuse = EdgeRules(weights="refuse")
    if field == "pattern":
        assert read_graph(tmp_path / "e.mtx", "degree", rules=refuse).edges.equal(graph.edges)
    else:
        with pytest.raises(ValueError, match=r"edges must have no weights .*, got values other than 1 in .*e\.mtx"):
            read_graph(tmp_path / "e.mtx", "degree", rules=refuse)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("bipartite", [False, True])
def test_rectangular_matrices_are_bipartite_graphs(tmp_path, shape, bipartite):
    matrix = np.zeros(shape)
    matrix[0, 1] = matrix[2, 0] = matrix[2, 2] = matrix[0, 2] = 1  # row 1 has no edge
    mmwrite(tmp_path / "e.mtx", sparse.coo_array(matrix), field="pattern")
    np.save(tmp_path / "x.npy", np.arange(8.0))
    graph = read_graph(tmp_path / "e.mtx", tmp_path / "x.npy", bipartite=bipartite)
    expected = [[row, shape[0] + column] for row, column in np.argwhere(matrix).tolist()]
    assert sorted(graph.edges.T.tolist()) == expected
    assert (graph.num_left, graph.sides) == (shape[0], shape)
    assert graph.x.flatten().tolist() == list(range(8))
    assert read_graph(tmp_path / "e.mtx", "degree").num_nodes == 8
    np.save(tmp_path / "x.npy", np.ones((shape[0], 2)))
    with pytest.raises(ValueError, match=f"features must have 8 rows, one for each node, got {shape[0]}"):
        read_graph(tmp_path / "e.mtx", tmp_path / "x.npy")


def test_nodes_of_a_matrix_are_in_the_order_of_the_features_whatever_their_ids(tmp_path, write):
    mmwrite(tmp_path / "e.mtx", sparse.coo_array((np.ones(3), EDGES.T), (4, 4)))
    for ids in (NAMES, [1, 2, 3, 4], [10, 20, 30, 2**60]):
        (x,) = write(x_csv="id,a,b,c\n" + named(ids)[1])
        graph = read_graph(tmp_path / "e.mtx", x)
        check(graph)
        assert graph.node_ids.tolist() == ids
    (x,) = write(x_csv="id,a,b,c\n" + named([1, 3, 2, 4])[1])
    with pytest.raises(
        ValueError, match=r"features must be in the order of the rows of .*e\.mtx, got id 2 behind id 3\."
    ):
        read_graph(tmp_path / "e.mtx", x)


def test_wrong_matrices_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", X)
    mmwrite(tmp_path / "e.mtx", sparse.coo_array(np.ones((3, 3))))
    with pytest.raises(ValueError, match="features must have 3 rows, one for each node, got 4"):
        read_graph(tmp_path / "e.mtx", tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"got 3 ids in both, the first is 0\. A square matrix joins its own nodes"):
        read_graph(tmp_path / "e.mtx", "degree", bipartite=True)
    (tmp_path / "e.mtx").write_text("%%MatrixMarket matrix coordinate pattern general\n2 2 2\n1 2\n")
    with pytest.raises(ValueError, match=r"e\.mtx must be a matrix in Matrix Market format, got an error: Truncated"):
        read_graph(tmp_path / "e.mtx", "degree")
    mmwrite(tmp_path / "e.mtx", sparse.coo_array(np.eye(4)[::-1]))
    np.save(tmp_path / "x.npy", X * 1j)
    with pytest.raises(ValueError, match=r"x\.npy must hold numbers, got '0\.5j' in row 1 of the nodes, column 1"):
        read_graph(tmp_path / "e.mtx", tmp_path / "x.npy")


# ---- Ids -------------------------------------------------------------------------------------------------------------

NAMES = ["ann", "bob", "cat", "dan"]


def named(ids):
    edges = "\n".join(f"{ids[u]},{ids[v]}" for u, v in EDGES) + "\n"
    x = "\n".join(f"{name},{','.join(map(str, row))}" for name, row in zip(ids, X, strict=True)) + "\n"
    y = "".join(f"{ids[i]},{Y[i]}\n" for i in (2, 0, 3, 1))
    return edges, x, y


@pytest.mark.parametrize("headers", [("", "", ""), ("source,target\n", "name,a,b,c\n", "id,label\n")])
@pytest.mark.parametrize("ids", [NAMES, [2**60 + 7, 5, 2**60 + 8, 40], [4, 3, 2, 1]])
def test_ids_are_mapped_to_rows_and_kept(write, headers, ids):
    edges, x, y = (header + text for header, text in zip(headers, named(ids), strict=True))
    paths = write(e_csv=edges, x_csv=x, y_csv=y)
    graph = read_graph(*paths, ids=None if headers[0] or ids is NAMES else True)
    check(graph)
    assert graph.node_ids.tolist() == ids


def test_a_first_column_that_may_hold_ids_is_refused(write):
    e, x = write(e_csv="2,0\n", x_csv="7,1\n3,0\n4,1\n5,0\n")
    with pytest.raises(ValueError, match=r"x\.csv must tell whether its first column holds ids .* first row is '7, 1'"):
        read_graph(e, x)
    assert read_graph(e, x, ids=False).x.tolist() == [[7, 1], [3, 0], [4, 1], [5, 0]]


def test_ids_that_fit_no_features_are_refused(write):
    e, x, y = write(e_csv="ann,bob\nann,eve\n", x_csv=named(NAMES)[1], y_csv="id,label\nann,1\nann,2\n")
    with pytest.raises(ValueError, match=r"e\.csv must hold ids that the features have too, got 1 other ids, .* eve"):
        read_graph(e, x)
    (plain,) = write(z_csv=lines(X))
    with pytest.raises(ValueError, match="features must have the ids of the nodes as their first column"):
        read_graph(e, plain, header=False)
    (good,) = write(g_csv="ann,bob\n")
    with pytest.raises(ValueError, match=r"y\.csv must have one row for each id, got 1 ids with several rows, .* ann"):
        read_graph(good, x, y)


def test_a_header_of_unusual_names_is_told_from_an_edge_by_the_ids(write):
    e, x = write(e_csv="follower,followed\n" + named(NAMES)[0], x_csv=named(NAMES)[1])
    check(read_graph(e, x))


KINDS_OF_IDS = {
    "counted": list(range(6)),
    "sparse": [7, 10**12, -3, 55, 0, 2**52],
    "texts": ["ann", "Doe, J", "c#", "user 4", "ü", "007x"],
}


@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1),
    kind=st.sampled_from(sorted(KINDS_OF_IDS)),
    separator=st.sampled_from([",", ";", "\t"]),
    weighted=st.booleans(),
)
def test_a_messy_edge_list_gives_the_graph_that_networkx_makes(pairs, kind, separator, weighted, tmp_path_factory):
    ids = KINDS_OF_IDS[kind]
    path = tmp_path_factory.getbasetemp() / "messy.csv"
    rows = [f'"{ids[u]}"{separator}"{ids[v]}"' + f"{separator}{n}.5" * weighted for n, (u, v) in enumerate(pairs)]
    header = f"source{separator}target" + f"{separator}weight" * weighted
    path.write_text("\n".join(["# made by hand", "% twice", header, rows[0], "", "# in between", *rows[1:]]), "utf-8")
    expected = nx.Graph([(ids[u], ids[v]) for u, v in pairs])
    nodes = set(expected)
    loops = list(nx.selfloop_edges(expected))
    expected.remove_edges_from(loops)
    if not expected.number_of_edges():
        with pytest.raises(ValueError, match="edges must hold at least one edge between two different nodes, got none"):
            read_graph(path, "degree")
        return
    graph = read_graph(path, "degree")
    names = list(range(graph.num_nodes)) if graph.node_ids is None else graph.node_ids.tolist()
    assert set(names) == nodes
    found = nx.Graph([(names[u], names[v]) for u, v in graph.edges.T.tolist()])
    assert nx.utils.edges_equal(found.edges, expected.edges)
    assert found.number_of_edges() == graph.edges.size(1)
    for rules, is_refused in ((EdgeRules(self_loops="refuse"), bool(loops)), (EdgeRules(weights="refuse"), weighted)):
        if is_refused:
            with pytest.raises(ValueError, match=r"edges must (join two different nodes|have no weights)"):
                read_graph(path, "degree", rules=rules)
        else:
            assert read_graph(path, "degree", rules=rules).edges.equal(graph.edges)


@pytest.mark.parametrize("directed", [False, True])
def test_edge_lists_of_networkx_and_gephi_keep_their_numbers(write, directed):
    graph = nx.DiGraph(EDGES.tolist()) if directed else nx.Graph(EDGES.tolist())
    text = "\n".join(nx.generate_edgelist(graph))
    assert text.startswith("2 0 {}")
    gephi = "Source,Target,Type,Id\n" + "".join(f"{u},{v},Undirected,{n}\n" for n, (u, v) in enumerate(EDGES))
    e, g, x = write(e_txt=text, g_csv=gephi, x_csv=lines(X))
    check(read_graph(e, x))
    check(read_graph(g, x))


# ---- Wrong files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "labels", "message"),
    [
        (
            "node,label\n0,1\n1,0\n",
            None,
            r"e\.csv must hold the two nodes of an edge .*, got columns node, label",
        ),
        ("0\n1\n", None, r"e\.csv must hold the two nodes of an edge in each row, got 1 column"),
        (
            "0,2,1\n1,1,3\n2,1,2\n",
            None,
            r"e\.csv must have .* got a first column that counts the rows",
        ),
        ("0,1,2\n0,3\n", None, r"e\.csv must have rows of one length, got 3 cells in line 1, '0,1,2', and 2"),
        ("1,2\n2,3\n0,3,1\n", None, r"e\.csv must have rows of one length, got 2 cells and then 3 in line 3"),
        ("1,2\n2,x\n", None, r"features must have the ids of the nodes as their first column"),
        ("1,2\n2,\n", None, r"e\.csv must hold an id in every row, got none in row"),
        ("1,2\n2,1.5\n", None, r"e\.csv must hold integer node ids or texts, got fractions"),
        ("1,2\n2,3\n", "1\n-1\n0\n1\n", "labels must hold a class for each node, got none for 1 nodes, the first is 1"),
        ("1,2\n2,3\n", "1.0\n-1.0\n0.5\n1\n", "labels must hold a class for each node, got none for 1 nodes"),
        ("1,2\n2,3\n", "1.0\n0.5\n0\n1\n", "labels must be classes, got a fraction for node 1"),
        ("1,2\n2,3\n", "a,b,c\n" * 4, r"y\.csv must have one column of classes, or .* got 3 columns"),
        ("1,2\n2,3\n", "node,label\n0,5\n1,5\n2,6\n9,6\n", "labels must hold ids that the features have too, got 1"),
    ],
)
def test_wrong_files_are_refused(write, edges, labels, message):
    paths = write(e_csv=edges, x_csv=lines(X), **({} if labels is None else {"y_csv": labels}))
    with pytest.raises(ValueError, match=message):
        read_graph(*paths)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("1,2\n3,x\n5,6\n7,8\n", r"x\.csv must hold numbers, got 'x' in row 2 of the nodes, column 2"),
        ("1,2\n3,\n5,6\n7,8\n", r"x\.csv must hold numbers, got '' in row 2 of the nodes, column 2"),
        ("1.5,2\n3,nan\n5,6\n7,8\n", r"features must be finite, got 1 NaN .* the first one is feature 1 of node 1"),
    ],
)
def test_wrong_features_are_refused(write, features, message):
    e, x = write(e_csv=lines(EDGES), x_csv=features)
    with pytest.raises(ValueError, match=message):
        read_graph(e, x)


def test_a_hashtag_is_no_comment(write):
    e, x = write(e_csv="#ann,bob\ncat,dan\n", x_csv=named(NAMES)[1])
    with pytest.raises(ValueError, match=r"e\.csv must have a space behind the # or % of a comment .* '#ann,bob'"):
        read_graph(e, x)


# ---- Duplicates, self-loops and weights ------------------------------------------------------------------------------


def test_rules_are_the_same_for_files_and_data(write):
    from torch_geometric.data import Data

    e, x = write(e_csv="2,0\n0,2\n1,2\n3,3\n3,1\n3,1\n", x_csv=lines(X))
    edge_index = torch.tensor([[2, 0, 1, 3, 3, 3], [0, 2, 2, 3, 1, 1]])
    data = Data(x=torch.from_numpy(X).float(), edge_index=edge_index, edge_weight=torch.ones(6))
    from suffice.link.data.graph import Graph

    for make in (lambda rules: read_graph(e, x, rules=rules), lambda rules: Graph.from_data(data, "g", rules=rules)):
        check(make(None))
        with pytest.raises(ValueError, match=r"edges must be listed once each, got 2 duplicates, .*'merge'"):
            make(EdgeRules(duplicates="refuse"))
        with pytest.raises(ValueError, match=r"edges must join two different nodes, got 1 self-loops, .*'drop'"):
            make(EdgeRules(self_loops="refuse"))
    with pytest.raises(ValueError, match="edges must have no weights or other values, got edge_weight"):
        Graph.from_data(data, "g", rules=EdgeRules(weights="refuse"))
    (weighted,) = write(w_csv="2,0,1.5\n1,2,1\n3,1,1\n")
    with pytest.raises(ValueError, match=r"edges must have no weights .*, got 1 more columns in .*w\.csv"):
        read_graph(weighted, x, rules=EdgeRules(weights="refuse"))


def test_a_list_with_both_directions_of_all_edges_has_no_duplicates(write):
    e, x = write(e_csv=lines(np.concatenate([EDGES, EDGES[:, ::-1]])), x_csv=lines(X))
    check(read_graph(e, x, rules=EdgeRules(duplicates="refuse")))


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="duplicates must be merge or refuse, got 'keep'"):
        EdgeRules(duplicates="keep")


@pytest.mark.parametrize("symmetry", ["symmetric", "skew-symmetric", "hermitian"])
def test_symmetric_matrices_must_be_square(tmp_path, symmetry):
    path = tmp_path / "e.mtx"
    path.write_text(f"%%MatrixMarket matrix coordinate real {symmetry}\n3 4 2\n2 1 1\n3 1 1\n")
    with pytest.raises(ValueError, match=rf"e\.mtx must be a matrix .* 3 rows and 4 columns, .* but {symmetry}"):
        read_graph(path, "degree")
