"""Texts of reports, on made-up reports and on OpenI's real ones."""

from __future__ import annotations

import re

import pytest

from pspg.engine.data.preparation.reports import clean, impression, why_none
from tools.show_reports import openi_archive, openi_report, read_reports

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough

 FINDINGS:

 PA and lateral views of the chest provided.  There is no pneumothorax.

 IMPRESSION:

 1.  No acute cardiopulmonary process
 2.  Nodule of 1.4 cm in the right lung, seen on the lateral view, new since ___.

 NOTIFICATION:  The findings were discussed with ___, M.D. by ___, M.D. on
 the telephone on ___ at 3:45 PM, 2 minutes after discovery of the findings.
"""


def test_the_impression_alone_is_kept() -> None:
    assert impression(REPORT) == "No acute cardiopulmonary process. Nodule of 1.4 cm in the right lung, new."


@pytest.mark.parametrize(
    ("report", "text"),
    [
        ("FINDINGS: Clear lungs.", None),
        ("IMPRESSION: ___", None),
        ("CONCLUSION: Clear lungs.", "Clear lungs."),
        (" Impression: Clear lungs.\n", "Clear lungs."),
        ("IMPRESSION\n Clear lungs.\nRECOMMENDATION(S): CT", "Clear lungs."),
        ("IMPRESSION: Old.\nADDENDUM: x\nIMPRESSION: Revised.", "Revised."),
        ("IMPRESSION: Old. IMPRESSION: Exam: CXR FINDINGS: x. IMPRESSION: Revised.", "Revised."),
        ("IMPRESSION:\nCHEST: Clear.\nKNEE: No fracture.", "CHEST: Clear. KNEE: No fracture."),
        # Without a colon, with another sign, in other words.
        ("INDICATION: Pain.\nIMPRESSION Left effusion.", "Left effusion."),
        (" IMPRESSION - Clear.", "Clear."),
        (" IMPRESSION. Clear.", "Clear."),
        (" IMP: Clear.", "Clear."),
        ("FINDINGS AND IMPRESSION: Clear.", "Clear."),
        ("FINDINGS/ IMPRESSION:\nClear.", "Clear."),
        ("Final Impression: Clear.", "Clear."),
        ("RADIOLOGIST'S IMPRESSION: Clear.", "Clear."),
        ("XXXX IMPRESSION: Clear.", "Clear."),
        ("IMPRESSION\r\n Clear.\r\n", "Clear."),
        ("IMPRESSION: Clear. FINDNGS: Nodule.", "Clear."),
        ("IMPRESSION: Clear.\nFINIDNGS: Nodule.\nCOMPARISION: None.", "Clear."),
        # Headings that only look like it.
        ("COMPRESSION: Vertebra.", None),
        ("INDICATION: Impression of a mass.", None),
    ],
)
def test_headings(report: str, text: str | None) -> None:
    assert impression(report) == text


@pytest.mark.parametrize(
    "heading",
    [
        "IMPRESSON",
        "IMPRRESSION",
        "IMORESSION",
        "IMPRESSOIN",
        "IMPRSSION",
        "IMPRESION",
        "IMPERSSION",
        "MPRESSION",
        "IMPESSION",
        "CONCUSION",
        "COINCLUSION",
        "INPRESSION",
        "IMPRESIONS",
        "CONCLUSIN",
    ],
)
@pytest.mark.parametrize(
    "form", ["{}: Clear.", "{}\nClear.", "{} :\n\n Clear.", "History. {}: Clear.", "FINAL {}: Clear."]
)
def test_misspelt_headings(heading: str, form: str) -> None:
    """The misspellings of MIMIC-CXR's own parser, and others, capitals and not."""
    assert impression(form.format(heading)) == "Clear."
    if form[0] == "{" and form[2] == ":":
        assert impression(form.format(heading.title())) == "Clear."


@pytest.mark.parametrize("whose", ["CLINICAL", "REFERRING", "REFERRER'S", "PRELIMINARY", "PRIOR", "ADMITTING", "ED"])
@pytest.mark.parametrize("form", ["{} IMPRESSION: Mass.\n", "HISTORY: cough {} IMPRESSION: Mass.\nFINDINGS: None."])
def test_an_impression_of_someone_else_is_none(whose: str, form: str) -> None:
    report = form.format(whose)
    assert impression(report) is None
    assert impression(report + "\nIMPRESSION: Clear.") == "Clear."
    assert why_none(report) == "report whose only impression is a clinical, preliminary or other one"


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ("", "report without text"),
        (" \n---\n 12", "report without text"),
        ("Lungs are clear.", "report without headings"),
        ("FINDING: Clear.", "report without impression or conclusion"),
        ("IMPRESSION:\n\nFINDINGS: Clear.", "report whose impression is empty, or only redacted, views or names"),
        ("IMPRESSION: ___", "report whose impression is empty, or only redacted, views or names"),
    ],
)
def test_why_a_report_is_left_out(report: str, reason: str) -> None:
    assert impression(report) is None
    assert why_none(report) == reason


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Sarcoidosis, stage 1. No effusion.", "Sarcoidosis, stage 1. No effusion."),
        ("Sarcoidosis Stage 1.", "Sarcoidosis Stage 1."),
        ("1. Sarcoidosis stage 2. Clear. 2. Edema.", "Sarcoidosis stage 2. Clear. Edema."),
        ("1. Fracture of ribs 1 and 2. Clear.", "Fracture of ribs 1 and 2. Clear."),
        ("Level of T 1. Normal.", "Level of T 1. Normal."),
        ("Lung-RADS 1. Routine.", "Lung-RADS 1. Routine."),
        ("POD 1. No edema.", "POD 1. No edema."),
        ("Edema of grade 1) Small effusion.", "Edema of grade 1) Small effusion."),
        ("Edema. Dr. ___ was paged at 10:15 a.m. on ___. Tube in place.", "Edema. Tube in place."),
        ("Findings were communicated by phone. Edema.", "Edema."),
        ("Abnormal mediastinum as discussed below.", "Abnormal mediastinum as discussed below."),
        ("The tube ends high, as discussed with Dr. ___ at 12:30 on 3/4/2012.", "The tube ends high."),
        ("After review with the attending radiologist, there is edema.", "There is edema."),
        ("Single AP view of the chest was obtained. Clear.", "Clear."),
        ("PA and lateral views of the chest show a large heart.", "A large heart."),
        ("AP chest compared to ___ through ___, 4:30 a.m.:\n\n Edema is new.", "Edema is new."),
        ("In comparison with the study of ___, there is no change.", "There is no change."),
        ("As compared to the study of ___ at 5:00 a.m., edema is worse.", "Edema is worse."),
        ("Portable chest radiograph is compared to the exam from ___ at 05:42. Clear.", "Clear."),
        ("Effusion has grown on radiographs from ___ through ___.", "Effusion has grown on radiographs."),
        ("AP chest compared to ___ shows a nodule <5 mm.", "AP chest shows a nodule <5 mm."),
        ("Left lateral rib fracture.", "Left lateral rib fracture."),
        ("No XXXX of pleural effusions. Normal chest x-XXXX.", "No pleural effusions. Normal chest x-ray."),
        ("XXXX change. Clear.", "Clear."),
        ("Nodules concerning for<BR>metastasis.", "Nodules concerning for metastasis."),
        ("Loss of XXXX of a vertebra.", "Loss of a vertebra."),
        ("Chest radiograph. 1. No edema.", "No edema."),
        ("1.Lucency 2. Level of T 10. Normal 3) Edema", "Lucency. Level of T 10. Normal. Edema"),
        ("Hand 1. Fracture. Chest 1. Clear.", "Hand. Fracture. Chest. Clear."),
        ("Small effusion vs. atelectasis of 1.4 cm..", "Small effusion vs atelectasis of 1.4 cm."),
    ],
)
def test_what_is_left_out(text: str, kept: str) -> None:
    assert clean(text) == kept


def test_openi_text_is_unescaped() -> None:
    xml = b'<a><AbstractText Label="IMPRESSION">[&amp;lt;Normal.&amp;gt;] Clear.</AbstractText></a>'
    assert impression(openi_report(xml)) == "Normal. Clear."


def test_real_reports() -> None:
    """All of OpenI: nearly every report with an impression keeps one, and nothing that names people or gaps."""
    reports = dict(read_reports(openi_archive()))
    given = {name for name, report in reports.items() if re.search(r"^IMPRESSION: *\S", report, re.MULTILINE)}
    texts = {name: text for name, report in reports.items() if (text := impression(report))}
    assert (len(reports), len(given), len(texts)) == (3955, 3921, 3921)
    left = re.compile(
        r"XXXX|\bDr\b|physician|radiologist|telephone|notified|^\d\. |\s[.,]|IMPRESSION|\[<|>\]", re.MULTILINE
    )
    assert not [name for name, text in texts.items() if left.search(text)]


@pytest.mark.parametrize(
    "report", ["", "Lungs are clear.", "CLINICAL IMPRESSION: Rule out pneumonia.\n\nFINDINGS: Clear.\n"]
)
def test_no_heading_or_only_the_referrers_is_no_impression(report: str) -> None:
    assert impression(report) is None
