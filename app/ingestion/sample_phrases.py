"""What customers of the invented shop Marlow & Finch ask, and what its assistant answers."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Draw = Callable[[], float]
"""The next number of a random sequence, in [0, 1)."""


class Exchange(NamedTuple):
    """Phrases of one turn: any of `asks` may be answered by any of `replies`."""

    asks: tuple[str, ...]
    replies: tuple[str, ...]


class Intent(NamedTuple):
    """One thing a customer can want."""

    label: str
    about_order: bool
    """Whether a remark about when the order was placed may come before the question."""
    leads_to: tuple[str, ...]
    """Intents that a customer may turn to next with the same order."""
    openings: tuple[Exchange, ...]
    later: tuple[Exchange, ...]
    """Questions that follow, about the same order or product, in the order in which they make sense."""
    unnumbered: tuple[Exchange, ...]
    """The customer leaves the order number out and is asked for it ..."""
    number: tuple[Exchange, ...]
    """... and gives it; what is said to the first opening then answers this too."""


# A topic starts with `#`: its label, `order` if it is about one, and the topics it leads to. Its questions
# follow, each group with its replies (`>`); a section of the topic starts with its name (`later`, ...).
#
# A phrase is a template: `[a|b|]` stands for one of the alternatives, `{order}` for a slot. A customer's
# phrase is written in lower case and ends with `?` when it is a question; its final spelling belongs to
# `sample`. The same question never belongs to two topics. A reply repeats only slots that the customer has
# named by then, except `{weekday}`, which the shop itself promises, and writes its own numbers as words: a
# model trained on these should not learn to invent a number.
SCRIPT = """
# smalltalk_greeting
[hello|hi|hey]
[hello|hi|hey|good morning|good afternoon|good evening][| there]
[hello|hi|hey][, is anyone there?|, anybody here?|, can you help me?|, I have a question]
> Hello and welcome to Marlow & Finch! How can I help you [today|with your home or garden]?
> Good to see you at Marlow & Finch! What can I do for you[| today]?
[hello|hi|hey|good morning|good evening], [this is {name}|{name} here|my name is {name}]
> Hello {name} and welcome to Marlow & Finch! How can I help you [today|with your home or garden]?

# smalltalk_thanks
[thanks|thank you|many thanks|thanks a lot|thank you so much|cheers][|, that helps| for your help|, bye]
[great|perfect|ok|okay|lovely|super|alright], [thanks|thank you|thank you very much][|, that is all|, bye]
[that is all|that's everything|nothing else], [thanks|thank you|have a nice day]
[that was|you have been] [very|really|so] helpful, [thanks|thank you]
> You are welcome! Thank you for shopping at Marlow & Finch[.|, and have a lovely day.]
> My pleasure! Thank you for choosing Marlow & Finch[.|, and enjoy your day.]

# order_status order -> order_cancel delivery_address_change delivery_missing human_handover
where is [my order|order] {order}?
[where is|where's|wheres] [my order|order|the order|my order number] {order}?
[where is|what happened to|any news on|what is the status of] [order|order number|my parcel, order] {order}?
[can you|could you|would you] [track|check|look up] [my order|order|order number] {order}[| for me]?
has [my |]order {order} [shipped|left the warehouse|been sent out|been dispatched][| yet| already]?
I am [still |]waiting for [my order|order|order number] {order}[|, where is it?|, any update?]
when will [my order|order|the order] {order} [arrive|get here|come|be delivered]?
I [want|need|would like] to know where [my order|order] {order} is
> Order {order} left our warehouse [yesterday|this morning] and should reach you on {weekday}.
> Order {order} is on its way with our courier and will arrive on {weekday}[.|, as planned.]
> Good news: order {order} is packed and on its way, and should reach you on {weekday}.
later
[can I|could I|how do I] [track|follow] [it|the parcel|the van] [online|myself|on a map]?
[is there|do you have|can you send me] a tracking [link|number|code][| for it| for my parcel]?
> Yes, the tracking link for order {order} is in your shipping e-mail and under My orders.
> You can track order {order} under My orders; the courier updates the link every [hour|evening].
[why is|how come] [it|my parcel|the parcel] [is |]taking so long?
[it|the parcel] should have [been here|arrived|come] [days ago|last week|by now], what is the hold-up?
> I am sorry for the wait: the courier of order {order} is running late, but {weekday} still holds.
> Sorry about that: order {order} was held up on the road and will arrive on {weekday}.
unnumbered
where is my order?
[where is|where's|what about|any news on] my [order|parcel|package]?
[can you|could you] [track|check on|find] my [order|parcel|package][| for me]?
my [order|parcel|package] [still has not|has not|hasn't] [arrived|come|been shipped][|, where is it?]
> [Of course|Happy to help]. Which order number should I look up to see where your parcel is?
> Let me see where your parcel is. Could you give me the order number[, please|]?
number
[the parcel I am waiting for is|please track|I am waiting for] [order |order number |]{order}
[it is|it's|sure,] order {order}[, where is it?|, please track it|, is it on its way?]

# order_cancel order -> refund_status human_handover
[can you|could you|please] [cancel|stop] [my order|order|order number] {order}[|, I changed my mind]
I [want|would like|need|have] to cancel [my order|order|the order] {order}
how [do I|can I] cancel [my order|order|order number] {order}?
[is it possible|is it too late] to cancel [my order|order] {order}?
I [no longer want|do not want|don't need] order {order}, [cancel it|please cancel it|can I cancel it?]
> Order {order} is cancelled[.|, as you asked.] You will not be charged for anything that was in it.
> I have cancelled order {order} for you. Anything you already paid goes back to you [in|within] five days.
later
[will I|do I] get [a|an e-mail with the|a written] confirmation of the cancellation?
how do I know [that |]the cancellation [worked|went through|is done]?
is it [really|definitely|now] cancelled?
> Yes, the cancellation of order {order} is final, and the confirmation arrives by e-mail within the hour.
> Under My orders you will now see order {order} marked as cancelled.
unnumbered
I [want|would like|need|have] to cancel [my|an] order
[can you|could you|how do I|how can I] cancel [my|an] order?
please cancel my [order|last order|purchase]
> [Of course|No problem]. Which order number [should I|would you like me to] cancel?
number
[cancel|please cancel|I want to cancel|the one to cancel is] [order |number |]{order}

# order_change -> delivery_address_change order_status
[can I|could I|I want to|I would like to] add [a|another|one more] {product} to [my order|order] {order}
[can you|could you|please] add [a|another|one more] {product} to [my order|order] {order}[, I forgot it|]
> Done: I have added the {product} to order {order}[.|, and the new total is in your e-mail.]
> Order {order} is changed and now includes the {product}. It still ships on {weekday}.
[can you|could you|please] [take|remove] the {product} [out of|from] [my order|order] {order}
I [want|would like|need] to change order {order}, [please remove|leave out] the {product}
> Done: I have removed the {product} from order {order}[.|, and the new total is in your e-mail.]
> Order {order} is changed and no longer includes the {product}. The rest ships on {weekday}.
later
[does|will] [the change|changing it|this change] [cost extra|delay the order|make it later]?
[can I|may I|am I able to] [change it again|make another change][| later| tomorrow]?
> Changing order {order} is free, and you can change it again until it ships on {weekday}.

# refund_status order -> human_handover service_complaint
[where is|where's|what about|any news on] [my|the] refund for [order|order number] {order}?
when [will I get|do I get|can I expect] [my refund|the refund] for [order|my order] {order}?
has the refund for [order|my order] {order} been [paid out|processed|sent][| yet| already]?
I am [still |]waiting for [my|the] refund for [order|my order] {order}
what is the status of [my|the] refund for order {order}?
> The refund for order {order} was sent [yesterday|this morning] and should be on your account by {weekday}.
> Your refund for order {order} is approved, and your bank should show it by {weekday}.
later
[why does|how come] a refund [take|takes] [so long|that long|several days]?
[which|what] [account|card] does the refund go to?
is [that|it] [the|a] full refund?
> The full refund for order {order} goes back the way you paid; the bank needs [two|three] days to book it.
> Banks book a refund slowly, but the full refund for order {order} will show by {weekday}.

# refund_request order -> refund_status human_handover service_complaint
I want my money back for order {order}
I [want|would like|need] [my money back|a refund] for [order|my order|order number] {order}
[can I|how do I|how can I] [get a refund|get my money back|request a refund] for [order|my order] {order}?
[please|can you|could you] refund [order|my order|order number] {order}
[give me|I demand|I am asking for] a [full |]refund for [order|my order] {order}
I am not [happy|satisfied] with order {order}, [I want my money back|please refund me|can I get a refund]
> I have requested a refund for order {order}. You will have your money back within [five|seven] days.
> Your refund request for order {order} is accepted, and we will pay the money back within [five|seven] days.
later
do I [have|need] to send [it|everything|the item] back [first|before you refund me]?
do you refund [the postage|the shipping|the delivery fee] [too|as well|also]?
> We refund order {order} in full, postage included, once you have posted the item with our free label.
unnumbered
I want [my money back|a refund]
I [want|would like|need] [my money back|a refund|to be refunded]
[can I|could I|how do I|how can I] [get a refund|get my money back|request a refund]?
> [I am sorry to hear that|Of course]. Which order number should I [request the refund for|refund]?
number
[please refund|refund me for|I want the money back for|the refund is for] [order |number |]{order}

# return_how_to -> refund_request exchange refund_status
how [do I|can I|does one] [return|send back] the {product}[| from my order| I bought]?
I [want|would like|need] to [return|send back] the {product}[|, how does that work?|, what do I do?]
what is the way to [return|send back] a {product}?
[can I|may I] still [return|send back] the {product}[| I ordered]?
where do I [send|post] the {product} [back|if I want to return it]?
> To return the {product}, print the free return label under My orders, pack it well and post it.
> You can return the {product} within thirty days: print the return label under My orders and post it.
how [do I|can I|does one] [return|send back] [an item|something|a product][| to you| I bought]?
I [want|would like|need] to [return|send back] [something|an item|a few things]
what is your return policy[| for garden goods| for sale items]?
> To return an item, print the free return label under My orders, pack it well and post it.
later
[is the return|is sending it back] free[| of charge]?
[who pays for|how much is] the return [postage|label]?
I [do not|don't] have a printer for the return label
do I need the original [box|packaging] for the return?
> Returns are free, any sturdy box will do, and the post office can print the return label from your phone.

# exchange -> delivery_time return_how_to
[can I|could I|how do I|I want to|I would like to] [exchange|swap] the {product} for [a|the] {other}
[is it possible|would it be possible] to [exchange|swap] my {product} for a {other}?
I would rather have [a|the] {other} than the {product}, [can I exchange it|can I swap it]?
> Yes, you can exchange the {product} for the {other}; the exchange label is in your e-mail.
> I have set up the exchange: send us the {product} and we will post the {other} on {weekday}.
later
[what if|and if] the [new one|exchanged one|swapped item] [costs more|is cheaper|is more expensive]?
do I pay [the difference|anything|extra] for the [exchange|swap]?
> The exchange itself is free; we only charge or pay back the difference in price.

# delivery_time
how long does [delivery|shipping|a delivery] to {city} [take|usually take|normally take]?
how [fast|quickly|soon] [do you|can you] [deliver|ship] to {city}?
[what is|what's] the [delivery|shipping] time [to|for] {city}?
how many days until a parcel [gets to|reaches|is in] {city}?
[do you|can you] deliver to {city} [by the weekend|this week|before {weekday}]?
> Delivery to {city} takes [two to three|three to four] working days from the moment you order.
> We deliver to {city} within [two to three|three to four] working days, from Monday to Saturday.
how long does [delivery|shipping|a delivery] [take|usually take|normally take]?
how [fast|quickly|soon] [do you|can you] [deliver|ship]?
[what is|what's] [the|your] [delivery|shipping] time?
> Delivery takes [two to three|three to four] working days from the moment you order.
later
[is there|do you have|do you offer] [express|next-day|faster] delivery[| there]?
can I [choose|pick] [a delivery day|a time slot|the day of delivery]?
> Yes, express delivery takes one working day, and you can choose the day at the checkout.

# shipping_cost
how much [is|do you charge for] [shipping|postage|delivery] to {city}?
what does [shipping|postage|delivery] to {city} cost[| me]?
[is there|do you offer] free [shipping|delivery] to {city}?
do I [have to |]pay for [shipping|postage|delivery] to {city}?
> Shipping to {city} costs five euros, and it is free for orders above fifty euros.
> The shipping cost to {city} is five euros; above fifty euros we ship for free.
how much [is|do you charge for] [shipping|postage|delivery]?
is [shipping|delivery|postage] free[| of charge| in your shop]?
what does [shipping|postage|delivery] cost[| me]?
> Shipping costs five euros, and it is free for orders above fifty euros.
later
[and what is|what about] the shipping cost for [heavy|bulky|large] [items|furniture]?
does [a bench|a bookshelf|furniture] cost more to ship?
> Bulky furniture has a shipping cost of twenty euros, wherever in the country it goes.

# delivery_address_change order -> order_status delivery_time
[can you|please] [send|deliver|ship] order {order} to [my new address|another address|my office] in {city}
I [moved|have moved] to {city}, [can you|please] change the [delivery |shipping |]address of order {order}
[how do I|can I|I need to|I want to] change the [delivery |shipping |]address [of|for] order {order} to {city}
the address [of|on|for] order {order} is wrong, it should go to {city}
> I have changed the delivery address of order {order}; it now goes to {city}.
> The new address in {city} is saved for order {order}. Please check it under My orders.
later
will [it|the parcel] be [late|delayed] because of the new address?
[can I|how do I] [make that|save this as] my [main|default|standard] address?
> The new address does not delay order {order}. You can make it your standard address under My account.

# delivery_missing order -> refund_request human_handover service_complaint
order {order} [is marked as|says|shows as] delivered but [I never got it|I have nothing|nothing came]
the courier [says|claims] [he|she] delivered order {order}, but [it is not here|I did not get anything]
my parcel [from|for] order {order} [got lost|is lost|went missing|has been stolen]
I never [received|got] order {order}[| although it says delivered| but you say it was delivered]
> I am sorry that order {order} went missing. I have opened a search with the courier until {weekday}.
> Sorry about the missing parcel. The courier is searching for order {order} and will report by {weekday}.
later
[what if|and if] [you do not find|nobody finds|they cannot find] [it|the parcel|my parcel]?
my neighbours [do not have|did not take|have not seen] [it|the parcel] either
> If the missing parcel is not found by {weekday}, we will send order {order} again at no cost.

# delivery_damaged -> refund_request service_complaint
[my|the] {product} [arrived|came|was delivered] [broken|damaged|cracked|in pieces|scratched]
the {product} [has a crack|has a big scratch|is dented|is smashed][, what now?|, what can I do?|]
I [got|received] a [broken|damaged|cracked] {product}[|, what now?|, can you help?]
the box was [crushed|torn open|soaking wet] and the {product} is [broken|damaged]
> I am sorry that the {product} arrived damaged. We will send you a new one on {weekday}.
> Sorry about the damage! A replacement for the {product} leaves our warehouse on {weekday}.
order {order} [arrived|came|was delivered] [broken|damaged|in pieces]
[the item|something|everything] in order {order} is [broken|damaged|cracked]
> I am sorry that order {order} arrived damaged. We will send you a new one on {weekday}.
later
[do you need|should I send|shall I send] [a photo|photos|pictures] of the damage?
what [do|should|shall] I do with the [broken|damaged] one?
> Please send us a photo of the damage; the damaged one can go in the bin.

# wrong_item -> return_how_to refund_request service_complaint
I [ordered|bought|paid for] a {product} but [got|received|you sent me] a {other}
you sent [me |]the wrong [item|thing|product], a {other} instead of [a|the] {product}
there [is|was] a {other} in the box instead of [my|the] {product}
I [got|received] a {other} which I [did not order|never ordered], where is my {product}?
> Sorry for sending the wrong item! The right one, the {product}, leaves our warehouse on {weekday}.
> I am sorry about the wrong item. We will send the {product} on {weekday} and collect the {other} for free.
you sent [me |]the wrong [item|thing|product] [in|for|with] order {order}
order {order} [contains|has|came with] the wrong [item|thing|product]
> Sorry for sending the wrong item! The right one for order {order} leaves our warehouse on {weekday}.
later
[can I|may I] keep the [wrong one|wrong item|other one][| too| as a gift]?
[when|how] do you [collect|pick up] the wrong [one|item]?
> Our driver will collect the wrong item for free when the right one arrives.

# account_login -> password_reset human_handover
I [cannot|can't|am not able to] [log in|sign in|log into my account][| any more| on my phone| since {weekday}]
[why can I not|why can't I] [log in|sign in][| to my account| to the shop]?
I am locked out[| of my account] and cannot [log in|sign in]
the [login|sign-in] [page|button|form] [does not work|gives an error|keeps loading]
> Sorry that you cannot log in. Your account is unlocked; please try to log in again in [five|ten] minutes.
> Let us fix your login: clear the cookies of our shop, then log in with your e-mail address.
later
[it still does not work|still no luck|same error], I cannot [log in|sign in]
I tried [that|twice|another browser] and [the login|signing in] still [fails|does not work]
> I have sent you a login link by e-mail; it lets you log in once without a password.

# password_reset -> account_login human_handover
how [do I|can I] reset my password?
how [do I|can I|to] [reset|change|recover] my password?
I [forgot|have forgotten|lost|do not remember] my password[|, what now?|, can you help?|, how do I reset it?]
[can you|could you|please] [reset|send me a new link to reset] my password
I [need|want|would like] [a new password|to reset my password|to change my password]
[what do I do|who can help] if I [forgot|lost] my password?
> To reset your password, choose Forgot password on the login page and follow the link in our e-mail.
> I have sent you a link to reset your password; it is valid for [one hour|two hours].
later
[I did not get|I cannot find|where is] the [reset|password] [link|e-mail]
how [long|strong] must the new password be?
> Please look for the password link in your spam folder. A new password needs at least twelve characters.

# account_delete
I [want|would like] to [delete|close|remove] my [account|customer account|profile][| for good| completely]
how [do I|can I] [delete|close|get rid of] my [account|customer account|profile]?
[please|can you|could you] [delete|close|remove] my [account|customer account|profile][| and all my data]
> You can delete your account under My account, Privacy. We erase your data within thirty days.
> I have started to delete your account; please confirm the deletion through the link in our e-mail.
later
what happens to my [orders|data|invoices] [when|after] [the account is|my account is] deleted?
can I [undo|stop|take back] the deletion[| later| of my account]?
> After the deletion of your account we keep only invoices; you can undo the deletion for thirty days.

# account_email_change
how [do I|can I] [change|update] [my e-mail|my email address|the e-mail address of my account]?
I have a new [e-mail|email] address[|, how do I change it?|, please update my account]
[can you|could you|please] [change|update] [my e-mail|my email address|the email on my account]
my [old |]email address [no longer works|is wrong|has changed][|, how do I update it?]
> You can change your e-mail address under My account, Contact; we then send a link to the new address.
> To change your e-mail address, open My account, enter the new address and confirm the link we send.
later
[will|do] my orders [stay|move along|be kept] with the new [e-mail|email] address?
do I log in with the new [e-mail|email address] [then|from now on]?
> Yes, with the new e-mail address you keep all your orders and log in as before.

# payment_failed -> payment_methods human_handover
[my|the] payment of {amount} euros [failed|did not go through|was declined|was rejected]
[why was|why is] my [card|payment] of {amount} euros [declined|rejected|refused]?
I [tried|wanted] to pay {amount} euros but [the payment failed|it was declined|it gave an error]
the checkout [refuses|rejects|declines] my payment of {amount} euros
> Sorry that the payment of {amount} euros failed. Please try again or choose another card.
> Your bank declined the payment of {amount} euros, so nothing was charged. Please try again on {weekday}.
my [payment|card payment] [failed|did not go through|was declined|was rejected]
why [was|is] my [card|payment] [declined|rejected|refused]?
[the checkout|your shop] [refuses|rejects|declines] my [card|payment]
> Sorry that the payment failed. Please try again or choose another card.
later
[will|do] you keep my [basket|order] [until|while] the payment [works|goes through]?
I tried [again|twice|three times] and the payment still [fails|does not go through]
> We keep your basket for two days; when a card payment fails, a bank transfer works too.

# payment_methods
[which|what] [payment methods|ways to pay|cards] do you [accept|take|offer]?
[can I|could I|may I] pay [by invoice|by bank transfer|with a gift card|by credit card|in cash]?
how [can I|do I] pay [in your shop|on your site|online|for my basket]?
do you [accept|take] [credit cards|debit cards|gift cards|bank transfers|cash]?
> You can pay by credit card, debit card, bank transfer, gift card or invoice.
> We accept credit cards, debit cards, bank transfer, gift cards and payment by invoice.
later
[is there|do you charge] a fee for [paying by card|paying by invoice|any payment method]?
how [long|many days] do I have to pay [an invoice|when I choose invoice]?
> No payment method costs a fee, and if you pay by invoice you have fourteen days.

# invoice_request order -> double_charge
[can you|could you|please] [send|e-mail] me [the|an] [invoice|itemised receipt] for order {order}
I [need|would like] [the|an|a VAT|my] invoice for order {order}[| for my taxes| for my company]
where [can I find|do I find|is] the [invoice|receipt] for order {order}?
the [invoice|receipt] for order {order} is [missing|not in my e-mail|nowhere to be found]
> The invoice for order {order} is on its way to your e-mail address.
> You will find the invoice for order {order} as a PDF under My orders[.|, Documents.]
later
can you put my company [name |]on the [invoice|receipt]?
[can I|could I] [have|get] [the invoice|it] [on paper|by post|as a printed copy]?
> Yes, choose Edit invoice under My orders to add a company or ask for a paper copy of the invoice.

# double_charge order -> refund_status human_handover service_complaint
[I was|I have been|my card was] charged [twice|two times|double] for order {order}
[why did you|why do you] [charge|bill] me [twice|two times|double] for order {order}?
you [took|debited|charged] the money for order {order} [twice|two times]
there are two [charges|payments|debits] for order {order} on my [card|account|statement]
> Sorry about the double charge! The second payment for order {order} goes back to you by {weekday}.
> I can see that order {order} was charged twice; we will return the second charge by {weekday}.
later
how [could|can] I be charged twice[| for one order]?
[make sure|please see to it that] I am never charged twice again
> A page loaded twice and so the charge was made twice; we have fixed this for order {order}.

# voucher_code
[my|the] [voucher|voucher code|discount code] {voucher} [does not work|is not accepted|gives an error]
[how do I|where do I|how can I] [use|enter|redeem] the [voucher|voucher code|discount code|code] {voucher}?
why is the [voucher|discount code|promo code] {voucher} [not valid|expired|not working]?
[can I|may I] still [use|redeem] the [voucher|discount code|promo code] {voucher}?
> Enter the voucher code {voucher} at the checkout, below your basket. It is valid until {weekday}.
> The voucher code {voucher} works again: please enter it once more at the checkout.
[how do I|where do I|how can I] [use|enter|redeem] a [voucher|voucher code|discount code|gift voucher]?
my [voucher|voucher code|discount code] [does not work|is not accepted|gives an error]
[do you have|is there|can I get] a [voucher|discount code|promo code][| for new customers| for me]?
> Enter the voucher code at the checkout, below your basket; new customers find one in our newsletter.
later
can I [combine|use] [two vouchers|it with another voucher|the voucher more than once]?
does the voucher [count for|work on] [sale items|everything|furniture]?
> A voucher code works once, on everything we sell, and not together with another voucher.

# loyalty_points
how many [loyalty points|bonus points|points] do I [have|get for {amount} euros]?
[how do I|where can I|can I] [use|spend|redeem|collect] my [loyalty points|bonus points|points]?
[when do|do] my [loyalty points|bonus points] [expire|run out]?
my [loyalty points|bonus points] [are missing|have disappeared|were not added]
> Your loyalty points are shown under My account, and every euro you spend earns one point.
> You can spend your loyalty points at the checkout; they are valid for two years.
later
how much is [a point|one point|a loyalty point] worth?
do I [lose|keep] the points if I return [something|an order]?
> One hundred loyalty points are worth one euro, and a return takes its points back.

# product_availability
[is|when is] the {product} [back in stock|available|available again]?
[do you|does the shop] [still |]have the {product} [in stock|in your warehouse]?
[when will|when can] [you get|I get|I buy] the {product} again?
the {product} [is sold out|is out of stock|cannot be ordered], when [is it back|can I get it]?
how many {product} pieces do you have in stock?
> Yes, the {product} is in stock and can be shipped on {weekday}.
> The {product} is sold out now, but will be in stock again on {weekday}.
later
[can you|could you] [tell me|write to me|let me know] when it is [back|in stock]?
can you [reserve|put aside|hold] one for me[| until the weekend]?
> Choose Notify me on the page of the {product}, and we keep one in stock for you for two days.

# product_question -> product_availability warranty
[how big|how large|how tall|how wide|how heavy] is the {product}?
what are the [measurements|dimensions] of the {product}?
what [size|colour|weight] is the {product}?
[which|what] [colours|sizes|materials] does the {product} come in?
is the {product} [waterproof|dishwasher safe|made of wood|suitable for outdoors|washable]?
what is the {product} made of?
> The {product} comes in small, medium and large; size, colour and material are listed on its page.
> You will find the exact size and care of the {product} on its page, under Details.
later
[and|so] which size [do you recommend|should I take|fits a small room]?
[do you have|is there] a [picture|drawing|photo] with the [size|measurements] on it?
> Most customers choose the medium size of the {product}; a drawing with measurements is on its page.

# warranty
how long is the [warranty|guarantee] [on|of|for] the {product}?
is there [a|any|still a] [warranty|guarantee] [on|for] the {product}?
my {product} [broke|fell apart] after [a year|six months|two months], is that [under|covered by the] warranty?
I [want|would like|need] to [make|file] a [warranty|guarantee] claim for [my|the] {product}
> The {product} has a warranty of two years; a photo and the invoice are enough for a claim.
> The warranty covers the {product} for two years, and we repair or replace it for free.
how long is [the|your] [warranty|guarantee]?
what [warranty|guarantee] do you [give|offer][| on furniture| on your products]?
> Our products have a warranty of two years; a photo and the invoice are enough for a claim.
later
what does the [warranty|guarantee] not cover?
[where|how] do I send [the|my] warranty claim?
is the warranty [also |]valid for [gifts|a second-hand one]?
> The warranty covers all but normal wear; send your warranty claim through My orders, Help.

# opening_hours
when is [your|the] [shop|store|showroom] in {city} open[| on {weekday}]?
[what are|tell me] [your|the] opening [hours|times] in {city}
is [your|the] [shop|store|showroom] in {city} open [on {weekday}|on holidays|today|tomorrow]?
when does [your|the] [shop|store|showroom] in {city} [open|close][| on {weekday}]?
> Our shop in {city} is open from nine to seven, Monday to Saturday, and closed on Sundays.
[when|what time|until when] [are you|is your shop|is the shop] open[| today| tomorrow| on {weekday}]?
[what are|tell me] [your|the] opening [hours|times][| today| at the weekend| on {weekday}]
> Our shops are open from nine to seven, Monday to Saturday, and closed on Sundays.
later
[is there|do you have] [parking|a car park|a cafe] at the shop?
[are you|is the shop] open on [public holidays|Christmas Eve|Sundays] [too|as well]?
> Our shops are closed on public holidays, and all have free parking while they are open.

# service_complaint -> human_handover
[your|the] [service|customer service|support] is [terrible|awful|a disgrace|really bad|a joke]
I [am very unhappy|am really disappointed|am angry] [about|with] [your|the] [service|customer service|support]
I [want|would like] to [complain|make a complaint] about [your service|your support|a rude employee]
I have been [waiting|on hold] for [an hour|days|two weeks] and nobody [answers|helps me|replies]
this is the [worst|slowest] [service|customer service] [ever|I have ever had|I know]
> I am truly sorry about our service. I have recorded your complaint, and a manager will answer by {weekday}.
> Please accept our apologies for the bad service; a manager will answer your complaint by {weekday}.
later
[that|sorry] is not enough[|, what will you do about my complaint?|, my complaint is serious]
who [reads|handles|deals with] my complaint?
[will|do] I get [some compensation|a voucher] for [my complaint|this bad service]?
> Your complaint goes to the manager of our service team, who can also offer compensation.

# newsletter_unsubscribe
how [do I|can I] [unsubscribe from|stop|cancel|get off] [your|the] newsletter?
[please|can you] [take me off|remove me from|unsubscribe me from] [your|the] [newsletter|mailing list]
I [do not|don't|no longer] want [your|the|this] newsletter [any more|in my inbox]
[stop|please stop] sending me [your newsletter|newsletters|adverts by e-mail|these marketing mails]
> You are unsubscribed from our newsletter[.|, and the last one may come until {weekday}.]
> I have taken you off our newsletter list; you will get no more marketing e-mails.
later
[will|do] I still get [mails|messages] about my orders without the newsletter?
I [unsubscribed|clicked unsubscribe] [before|last month|twice] and the newsletter [still comes|came again]
> Without the newsletter you still get e-mails about your orders, but no marketing, I promise.

# gift_wrap
[can you|could you|do you] [gift wrap|gift-wrap] the {product}[| for a birthday| for a wedding]?
I [want|would like|need] the {product} [gift wrapped|as a gift|wrapped as a present]
[how much is|do you offer|is there] gift [wrapping|wrap] for the {product}?
the {product} is a [gift|present], can you [wrap it|put it in gift paper]?
> Yes, we gift wrap the {product} for three euros; tick Gift wrap at the checkout.
> Of course, the {product} can be gift wrapped in green or gold paper: tick Gift wrap at the checkout.
[can you|could you|do you] [gift wrap|gift-wrap] [my order|presents|something for a birthday]?
[how much is|do you offer|is there] gift [wrapping|wrap]?
> Yes, we gift wrap any order for three euros; tick Gift wrap at the checkout.
later
can I add a [card|greeting card|message|note] to the [gift|present]?
[will|can] the [price|invoice|bill] be left out of the gift box?
> Yes, a gift card with your message is free, and a gift box never contains the price.

# human_handover
[can I|I want to] talk to a human
[can I|could I|I want to|I would like to|let me] [talk|speak] to a [human|real person|human agent]
[please|can you] [connect me with|put me through to|get me] [a human|an agent|a real person]
I [do not|don't] want to [talk|chat] with a [bot|machine|robot][|, get me a human|, I want a real person]
is there a [human|real person|real agent] I can [talk|speak] to?
[human|agent|real person] please
> I am handing you over to a colleague, who will be with you in [five|ten] minutes.
> Of course, a human colleague will take over this conversation in [five|ten] minutes.
later
[how long|how many minutes] [do I|must I] wait for [the colleague|a human|the agent]?
[can|could] the [colleague|agent] [call me|phone me] instead?
> Your human colleague is next in line and will take over here, or call you if you prefer.
"""


def _exchanges(lines: list[str]) -> Iterator[Exchange]:
    """Yield each run of questions together with the run of replies after it, if there is one."""
    runs = (tuple(run) for _, run in itertools.groupby(lines, key=lambda line: line.startswith("> ")))
    for asks in runs:
        yield Exchange(asks, tuple(reply.removeprefix("> ") for reply in next(runs, ())))


def _intent(text: str) -> Intent:
    title, *lines = text.strip().splitlines()
    head, _, leads_to = title.partition(" -> ")
    label, *flags = head.split()
    sections: dict[str, list[str]] = {"openings": [], "later": [], "unnumbered": [], "number": []}
    section = sections["openings"]
    for line in lines:
        if line in sections:
            section = sections[line]
        else:
            section.append(line)
    return Intent(
        label=label,
        about_order="order" in flags,
        leads_to=tuple(leads_to.split()),
        **{name: tuple(_exchanges(section)) for name, section in sections.items()},
    )


GREETING, THANKS, *_topics = map(_intent, SCRIPT.strip().removeprefix("# ").split("\n# "))
TOPICS = tuple(_topics)
INTENTS = tuple(topic.label for topic in (GREETING, THANKS, *TOPICS))

FREQUENT = ("order_status", "order_status", "refund_request", "order_cancel", "password_reset", "human_handover")
"""Labels that come up more often than the others, once for each mention."""

LEAD_INS = (
    "I ordered [the {product}|a {product}|something|a few things] [from you|online|in your shop] on {date}. ",
    "I [placed|made] [the|my] order on {date}. ",
    "I bought [something|a few things|the {product}|a present] [from you|online|in your shop] on {date}. ",
)
"""Remarks before a question about an order."""

SALUTATIONS = (
    "hi, ", "hello, ", "hey, ", "good morning, ", "good evening, ", "hi there, ", "dear team, ", "sorry, ",
    "hello, {name} here, ", "hi, this is {name}, ", "quick question: ",
)  # fmt: skip
CONNECTIVES = ("also, ", "one more thing, ", "and ", "ok, and ", "by the way, ", "another question: ", "I see, ")
PLEAS = (" please", ", please", ", it is urgent", " asap", ", thanks", " please, I am in a hurry", " please, thank you")

PRODUCTS = (
    "Fernhill plant stand", "Lumen desk lamp", "Brindle wool throw", "Tamsin teapot", "Calder garden bench",
    "Pebble bird bath", "Marlin watering can", "Hazel bookshelf", "Rowan side table", "Sorrel seed box",
    "Dovetail tool chest", "Willow laundry basket", "Quill wall clock", "Saffron cushion", "Kestrel hammock",
    "Bramble door mat", "Larkspur vase", "Toft fire bowl", "Nettle kitchen apron", "Juniper bath mat",
    "Heron rain barrel", "Clover picnic rug", "Mistral wind chime", "Sévigné flower pot",
)  # fmt: skip
CITIES = (
    "York", "Leeds", "Bristol", "Dublin", "Cardiff", "Glasgow", "Berlin", "Hamburg", "Vienna", "Zürich",
    "Lyon", "Lille", "Ghent", "Utrecht", "Malmö", "Oslo", "Porto", "Seville", "Turin", "Prague",
)  # fmt: skip
NAMES = (
    "Clara", "Tomas", "Priya", "Yusuf", "Zoë", "Marek", "Ines", "Oskar", "Leila", "Ben", "Noor", "Hugo",
    "Aisha", "Greta", "Milo", "Femi", "Nadia", "Stefan", "Mei", "Ruth",
)  # fmt: skip
SURNAMES = ("Voss", "Adeyemi", "Lindqvist", "Okafor", "Brandt", "Moreau", "Castell", "Whitlock", "Tanaka", "Ruiz")
VOUCHERS = ("SPRING", "GARDEN", "WELCOME", "HOME", "SUMMER", "FINCH", "MARLOW", "GREEN")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip


def pick(draw: Draw, options: Sequence[T]) -> T:
    """Choose one of the options, each as likely as it is listed often."""
    return options[int(draw() * len(options))]


@functools.cache
def _alternatives(template: str) -> tuple[tuple[str, ...], ...]:
    """Split a template into its parts, each with the texts it may become."""
    parts = re.split(r"\[([^]]*)]", template)
    return tuple(tuple(part.split("|")) if odd % 2 else (part,) for odd, part in enumerate(parts) if part)


def say(draw: Draw, template: str, slots: Mapping[str, str]) -> str:
    """Turn a template into text: choose its alternatives, fill its slots."""
    text = "".join(options[0] if len(options) == 1 else pick(draw, options) for options in _alternatives(template))
    return text.format_map(slots) if "{" in text else text
