"""How a page looks in a browser: on the desktop and on a phone, light and dark, pointed at and tapped."""

from pathlib import Path

from surgeon.util import pages
from tests.support.browser import Browser

DESKTOP, PHONE = 1280, 390
VIEWS = [(width, dark) for width in (DESKTOP, PHONE) for dark in (False, True)]

# Everything that a person would stumble over, in words; [] if there is nothing.
LOOK = """(()=>{const found=[],all=[...document.querySelectorAll('h1,h2,p,td,th,pre,span,.tip,svg text')];
const numbers=c=>c.match(/[\\d.]+/g).map(Number),light=c=>{const[r,g,b]=numbers(c).slice(0,3).map(v=>v/255).map(v=>
v<=.03928?v/12.92:((v+.055)/1.055)**2.4);return .2126*r+.7152*g+.0722*b};
const behind=e=>{for(;e;e=e.parentElement){const c=getComputedStyle(e).backgroundColor;
if((numbers(c)[3]??1)>0)return c}};for(const e of all){if(!e.textContent.trim())continue;const s=getComputedStyle(e);
const color=e.ownerSVGElement?s.fill:s.color,[a,b]=[light(color),light(behind(e))].sort((x,y)=>y-x);
const ratio=(a+.05)/(b+.05);if(ratio<4.5)found.push(`contrast ${ratio.toFixed(2)}: ${e.textContent}`);
const scale=e.ownerSVGElement?e.ownerSVGElement.getBoundingClientRect().width/%d:1;
if(parseFloat(s.fontSize)*scale<9.5)found.push(`small: ${e.textContent}`)}
for(const v of document.querySelectorAll('svg')){const r=v.getBoundingClientRect(),t=[...v.querySelectorAll('text')].map(e=>
[e.textContent,e.getBoundingClientRect()]);for(const[n,[x,a]]of t.entries()){if(!x)continue;if(a.left<r.left-1||a.right>r.right+1||
a.top<r.top-1||a.bottom>r.bottom+1)found.push(`outside: ${x}`);for(const[y,b]of t.slice(n+1))
if(y&&a.left<b.right-1&&b.left<a.right-1&&a.top<b.bottom-2&&b.top<a.bottom-2)
found.push(`one on the other: ${x} and ${y}`)}}return found})()"""
LOOK = LOOK.replace("%d", str(pages.WIDTH))


def check(browser: Browser, page: Path) -> None:
    """Each mark of the page is pointed at, one is tapped; nothing is out of place in any view."""
    backgrounds = set()
    for width, dark in VIEWS:
        phone = width == PHONE
        browser.open(page, width=width, dark=dark, phone=phone)
        where = f"{page.name} at {width} px, {'dark' if dark else 'light'}"
        assert browser.value("document.documentElement.scrollWidth") <= width, f"{where}: it can be pushed sideways"
        assert browser.value(LOOK) == [], where
        backgrounds.add(browser.value("getComputedStyle(document.body).backgroundColor"))
        (tap if phone else point)(browser)
        assert browser.complaints() == [], where
    assert len(backgrounds) == 2, "light and dark"


def middle(browser: Browser, figure: int, mark: int) -> tuple[float, float]:
    """Where a mark is in the window, after it was scrolled into it."""
    x, y = browser.value(
        f"(()=>{{const m=document.querySelectorAll('figure')[{figure}].querySelectorAll('[data-tip]')[{mark}];"
        "m.scrollIntoView({block:'center'});const r=m.getBoundingClientRect();return[r.x+r.width/2,r.y+r.height/2]})()"
    )
    return x, y


def shown(browser: Browser, figure: int) -> str:
    return str(browser.value(f"document.querySelectorAll('figure')[{figure}].querySelector('.tip').textContent"))


def tips(browser: Browser) -> list[list[str]]:
    found: list[list[str]] = browser.value(
        "[...document.querySelectorAll('figure')].map(f=>[...f.querySelectorAll('[data-tip]')].map(m=>m.dataset.tip))"
    )
    return found


def point(browser: Browser) -> None:
    for figure, told in enumerate(tips(browser)):
        for mark in {0, len(told) - 1} if told else ():
            browser.point(*middle(browser, figure, mark))
            assert shown(browser, figure) in told, "of two marks at nearly one place either may be on top"
            browser.point(1, 1)
            assert shown(browser, figure).startswith("Point at a mark")


def tap(browser: Browser) -> None:
    for figure, told in enumerate(tips(browser)):
        if not told:
            continue
        x, y = middle(browser, figure, 0)
        browser.tap(x, y - 11)  # beside the mark, as fingers are
        assert shown(browser, figure) in told
        assert browser.value(f"document.querySelectorAll('figure')[{figure}].querySelectorAll('.on').length") == 1
