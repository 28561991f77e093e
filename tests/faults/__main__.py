"""``python -m tests.faults``: writes the table of all cases into docs/robustness.md."""

from tests.faults.case import BEGIN, DOCUMENT, END, table

if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
